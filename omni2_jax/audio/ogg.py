"""Whether an Ogg file is whole. libsndfile reads one that is cut short as a shorter recording."""

MAGIC = b"OggS"  # with which each page begins
HEADER = 27  # bytes of a page before the sizes of its segments; the last one is their number
# Bytes of a page at most: its header, 255 sizes, and 255 segments of 255 bytes.
PAGE = HEADER + 255 + 255 * 255
LAST = 4  # the bit of a page's flags that says: the last one of its stream


def is_whole(file, size: int) -> bool:
    """Whether the last page of an open Ogg file of `size` bytes is complete and ends its stream.

    Something shorter than a page, such as a tag, may follow it. Reference: RFC 3533, section 6.
    """
    file.seek(max(0, size - 2 * PAGE))
    end = file.read(2 * PAGE)
    page = end[max(0, end.rfind(MAGIC)) :]
    if len(page) < HEADER:
        return False
    sizes = page[HEADER : HEADER + page[HEADER - 1]]
    return len(page) >= HEADER + page[HEADER - 1] + sum(sizes) and bool(page[5] & LAST)
