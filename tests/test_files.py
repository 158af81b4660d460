import os

import pytest

from omni2_jax.files import atomic_directory, atomic_write, is_partial


def test_a_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as file:
        file.write("é")
        assert not path.exists()
        assert all(map(is_partial, tmp_path.iterdir()))
    assert path.read_text("utf-8") == "é"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path, "wb") as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_file_system_refuses_is_one_line(tmp_path):
    missing = pytest.raises(
        ValueError, match=r"^cannot write .*/missing/a: No such file or directory$"
    )
    with missing, atomic_write(tmp_path / "missing" / "a"):
        pass
    (tmp_path / "directory").mkdir()
    is_directory = pytest.raises(ValueError, match=r"^cannot write .*/directory: Is a directory$")
    with is_directory, atomic_write(tmp_path / "directory"):
        pass
    full = pytest.raises(ValueError, match=r"^cannot write .*/full: No space left on device$")
    with full, atomic_write(tmp_path / "full"):
        raise OSError(28, os.strerror(28))
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


def test_errors_of_other_files_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(tmp_path / "a"):
        open(tmp_path / "other").close()


def test_a_failed_directory_leaves_no_parents(tmp_path):
    with pytest.raises(KeyError), atomic_directory(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(tmp_path / "a" / "b" / "out"):
        pass
    assert (tmp_path / "a" / "b" / "out").is_dir()
