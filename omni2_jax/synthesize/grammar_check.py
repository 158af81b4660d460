"""Tries every rule of a grammar once, so that its faults are found before dialogues are made."""

import random
from collections.abc import Collection

from omni2_jax.synthesize.grammar import Draft, Grammar, Rule, Scope

SAMPLES = 10  # random turns after which a follow-up is tried


def check_grammar(grammar: Grammar) -> None:
    """Try every topic, and every follow-up after each turn that names it.

    Raises ValueError, with the place, for unknown names, filters and follow-ups, for conditions
    that never hold, for follow-ups that nothing leads to, and for templates that cannot be filled
    in.
    """
    for name in grammar.topics.keys() & grammar.follow_ups.keys():
        raise ValueError(f"{grammar.follow_ups[name].place}: {name!r} is also a topic")
    for rule in [*grammar.topics.values(), *grammar.follow_ups.values()]:
        for name in rule.follow_ups:
            if name not in grammar.follow_ups:
                raise ValueError(f"{rule.place}: there is no follow-up {name!r}")
    rng, met = random.Random(0), set[str]()
    visited: set[tuple[str, frozenset[str]]] = set()
    queue = [(topic, [Draft(grammar, ())] * SAMPLES) for topic in grammar.topics.values()]
    tried: dict[str, Rule] = {}
    while queue:
        rule, drafts = queue.pop()
        names = frozenset(drafts[0].before(rule))
        if (rule.name, names) in visited:
            continue
        visited.add((rule.name, names))
        check_names(rule, names)
        tried[rule.name] = rule
        extended = [new for draft in drafts if (new := draft.extended(rule, rng)) is not None]
        if extended:
            met.add(rule.name)
            fill_in(rule, extended[0].steps[-1].scope)
            queue += [(grammar.follow_ups[name], extended) for name in rule.follow_ups]
    for rule in tried.values():
        if rule.name not in met:
            place = rule.place if rule.where is None else rule.where.place
            raise ValueError(f"{place}: no values of {rule.name} meet its condition")
    for rule in grammar.follow_ups.values():
        if rule.name not in tried:
            raise ValueError(f"{rule.place}: the follow-up {rule.name} comes after no rule")


def fill_in(rule: Rule, scope: Scope) -> None:
    """Fill in all templates of a rule. Raises ValueError if one cannot be."""
    for phrasing in range(len(rule.questions)):
        rule.turn(scope, phrasing)
    rule.all_replies(scope)
    if rule.key is not None:
        rule.key.fill(scope)


def check_names(rule: Rule, before: Collection[str]) -> None:
    """Raises ValueError if a template or an expression uses a name that has no value.

    before: the names that the turn before leaves.
    """
    known = {*before, *rule.slots}
    expressions = [] if rule.where is None else [(None, rule.where)]
    for name, expression in [*expressions, *rule.let.items()]:
        check_known(expression.names - known, known, expression.place)
        known |= {name} if name else set()
    templates = [*rule.questions, *rule.replies, *rule.answers]
    for template in [*templates, *([rule.key] if rule.key else [])]:
        check_known(template.names - known, known, template.place)


def check_known(unknown: set[str], known: Collection[str], place: str) -> None:
    if unknown:
        listed = f"known are {', '.join(sorted(known))}" if known else "this rule has no slots"
        raise ValueError(f"{place}: there is no slot {min(unknown)!r}; {listed}")
