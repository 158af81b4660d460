"""YAML whose faults are named by file, line and column."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from yaml.constructor import ConstructorError

from omni2_jax import files
from omni2_jax.validation import fault

M = TypeVar("M", bound=pydantic.BaseModel)

MAX_FAULTS = 3  # that one message lists


class Loader(yaml.SafeLoader):
    """PyYAML's loader, in which a value that cannot be has a position, such as 2024-02-30."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise ConstructorError(None, None, str(error), node.start_mark) from None


class LocatedYaml:
    """The content of a YAML file, with the position of each of its values.

    Raises ValueError, one line, "FILE:LINE:COLUMN: ...", if the file is no YAML, or a name comes
    twice in a mapping.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            loader = Loader(path.read_text(encoding="utf-8"))
            self.root = loader.get_single_node()
            for key in repeated_keys(self.root, set()):
                raise ValueError(f"{self.at(key.start_mark)}: {key.value!r} comes twice")
            self.data: Any = None if self.root is None else loader.construct_document(self.root)
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not a text file in UTF-8") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise ValueError(f"{self.at(mark)}: {error.problem or error.context}") from None
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{path} is no YAML: {files.first_line(error)}") from None

    def at(self, mark: Any) -> str:
        return str(self.path) if mark is None else f"{self.path}:{mark.line + 1}:{mark.column + 1}"

    def place(self, *keys: str | int) -> str:
        """ "FILE:LINE:COLUMN" of the value that the keys lead to, as far as they lead."""
        node, mark = self.root, getattr(self.root, "start_mark", None)
        for key in keys:
            if isinstance(node, yaml.MappingNode):
                name, node = next(
                    (pair for pair in node.value if pair[0].value == str(key)), (None, None)
                )
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
                name, node = None, (node.value[key : key + 1] or [None])[0]
            else:
                break
            if node is not None:
                below = name is not None and name.start_mark.line < node.start_mark.line
                mark = name.start_mark if name is not None and below else node.start_mark
        return self.at(mark)

    def validated(self, kind: type[M]) -> M:
        """The content as a model. Raises ValueError naming the places of the first faults."""
        try:
            return kind.model_validate({} if self.data is None else self.data)
        except pydantic.ValidationError as error:
            faults = [
                f"{self.place(*details['loc'])}: {fault(details, {}, {})}"
                for details in error.errors(include_url=False)
            ]
            raise ValueError("; ".join(faults[:MAX_FAULTS])) from None


def repeated_keys(node: yaml.Node | None, visited: set[int]) -> Iterator[yaml.Node]:
    """The keys that come twice in a mapping. PyYAML would take the last one and say nothing."""
    if node is None or id(node) in visited:
        return
    visited.add(id(node))
    children: Sequence[Any] = node.value if isinstance(node, yaml.CollectionNode) else ()
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                yield key
            names.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        children = [value for _, value in node.value]
    for child in children:
        yield from repeated_keys(child, visited)
