"""The templates of a grammar: Jinja in its sandbox, with `<...>` around what is filled in.

    What is <a> plus <b>?           numbers are written as words: "What is two plus three?"
    <animal.name|plural> say moo.   a sentence begins with a capital: "Cows say moo."

Filters beside those of Jinja (upper, first, join, ...):

    words    5 -> "five". A number that is filled in as it is gets this filter by itself
    ordinal  5 -> "fifth"
    plural   "mouse" -> "mice"
    article  "owl" -> "an owl"
    spelled  "cat" -> "C, A, T"

There is one function, range: <range(3, 6)|map("words")|join(", ")> is "three, four, five".
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import inflect
import jinja2
from jinja2.exceptions import SecurityError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

ENGLISH = inflect.engine()
FAILURES = (
    jinja2.TemplateError,
    SecurityError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
)


@functools.lru_cache(4096)
def words(number: int) -> str:
    """An integer in English words: 42 -> "forty-two"."""
    return str(ENGLISH.number_to_words(str(number), andword=""))


def ordinal(number: int) -> str:
    """An integer as an ordinal number in words: 12 -> "twelfth"."""
    return str(ENGLISH.number_to_words(ENGLISH.ordinal(str(number)), andword=""))


def plural(noun: str) -> str:
    """The plural of an English noun. Raises ValueError as `checked`."""
    return ENGLISH.plural_noun(checked(noun))


def article(noun: str) -> str:
    """An English noun after "a" or "an". Raises ValueError as `checked`."""
    return ENGLISH.a(checked(noun))


def spelled(word: str) -> str:
    """The letters of a word as one says them: "C, A, T". Raises ValueError as `checked`."""
    return ", ".join(checked(word).upper())


def checked(word: Any) -> str:
    """A word as it is. Raises ValueError if it is a number or an empty text."""
    if not isinstance(word, str) or not word.strip():
        raise ValueError(f"expected a word, not {type(word).__name__} '{word}'")
    return word


def in_words(value: Any) -> Any:
    """What is written for a filled-in value: numbers become words."""
    return words(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a power is refused: it may take forever."""

    intercepted_binops = frozenset(["**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        raise SecurityError("** is not allowed")


def environment(start: str, end: str) -> Environment:
    """Jinja as the grammar files use it, with these marks around what is filled in."""
    jinja = Environment(
        variable_start_string=start,
        variable_end_string=end,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        finalize=in_words,
    )
    jinja.globals = {"range": jinja.globals["range"]}  # at most 100,000 numbers
    for function in (words, ordinal, plural, article, spelled):
        jinja.filters[function.__name__] = function
    return jinja


TEMPLATES = environment("<", ">")
EXPRESSIONS = environment("{{", "}}")  # in an expression, < and > compare


@dataclass(frozen=True)
class Part:
    """A template or an expression of a grammar file. place: "FILE:LINE:COLUMN", for messages."""

    source: str
    place: str

    def fault(self, error: Exception) -> ValueError:
        """The error to raise for a failure of Jinja or of a computation."""
        reason = error.message if isinstance(error, jinja2.TemplateError) else error
        return ValueError(f"{self.place}: {self.source!r}: {reason or type(error).__name__}")


class Template(Part):
    """A text with places to fill in."""

    @functools.cached_property
    def compiled(self) -> jinja2.Template:
        return TEMPLATES.from_string(self.source)

    @functools.cached_property
    def names(self) -> set[str]:
        """The names that it uses. Raises ValueError if it is no template."""
        try:
            _ = self.compiled
            return find_undeclared_variables(TEMPLATES.parse(self.source))
        except jinja2.TemplateError as error:
            raise self.fault(error) from None

    def fill(self, scope: Mapping[str, Any]) -> str:
        """The text. Raises ValueError if a value is missing or does not fit."""
        try:
            return self.compiled.render(scope).strip()
        except FAILURES as error:
            raise self.fault(error) from None

    def sentence(self, scope: Mapping[str, Any]) -> str:
        """The text, beginning with a capital. Raises ValueError as `fill`."""
        text = self.fill(scope)
        return text[:1].upper() + text[1:]


class Expression(Part):
    """A value to compute, in Jinja's notation: "a + b", "'Yes' if a % 2 == 0 else 'No'"."""

    @functools.cached_property
    def compiled(self) -> Any:
        return EXPRESSIONS.compile_expression(self.source, undefined_to_none=False)

    @functools.cached_property
    def names(self) -> set[str]:
        """The names that it uses. Raises ValueError if it is no expression."""
        try:
            _ = self.compiled
            return find_undeclared_variables(
                EXPRESSIONS.parse(f"{{% if ({self.source}) %}}{{% endif %}}")
            )
        except jinja2.TemplateError as error:
            raise self.fault(error) from None

    def value(self, scope: Mapping[str, Any]) -> Any:
        """The computed value. Raises ValueError if it cannot be computed."""
        try:
            value = self.compiled(scope)
        except FAILURES as error:
            raise self.fault(error) from None
        if isinstance(value, jinja2.Undefined):
            raise ValueError(f"{self.place}: {self.source!r}: it has no value")
        return value
