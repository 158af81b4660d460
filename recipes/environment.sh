# What the recipes that train on a CPU share. They read this file before they change the directory.

# Otherwise glibc returns the buffers of every training step to the system (23 % of the time), and gets
# them back in pages of 4 KB instead of 2 MB (20 % of what is left).
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1

# Paths may be relative to the directory in which the recipe is started.
for name in PIPER_VOICE OMNI2_WHISPER VOICE; do
    if [ -e "${!name:-}" ]; then export "$name=$(realpath "${!name}")"; fi
done

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
