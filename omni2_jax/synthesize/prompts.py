"""What a chat model is told when it writes dialogues, in English."""

from collections.abc import Sequence

STYLE = (
    "Write as people speak: complete, natural sentences. Use no lists, headings, code, tables, "
    "links, emojis, abbreviations or symbols, and nothing that only makes sense when it is read."
)
NUMBERS = " Write every number in words."

REWRITE = (
    "You turn written instructions for an assistant into spoken ones. You get one instruction. "
    "Say the same request as a person would say it aloud to a voice assistant, in at most {words} "
    "words. If it comes with a text or with data, say the part of it that is needed. {style} "
    "Answer with the spoken request alone. If the request makes no sense when it is spoken, "
    "because it asks for code, a table or a drawing, or needs a long text, answer with the single "
    "word SKIP."
)
REPLY = (
    "You are a voice assistant. Your answer will be spoken aloud and cannot be seen. Answer what "
    "the user asks for, correctly and kindly, in at most {words} words. {style}"
)
NEXT_QUESTION = (
    "You play the user of a voice assistant. You read the conversation up to now, and say what the "
    "user says next: a question or request that goes on from it naturally, such as asking for a "
    "detail, an example or a reason, or a change of what was said. Do not thank, do not end the "
    "conversation, and do not repeat a request. Use at most {words} words. {style} Answer with the "
    "user's words alone."
)
AGAIN = "This cannot be used: {fault}. Say the same in another way that keeps to the rules."
TRIAL = "Answer with the single word yes."

SKIP = "SKIP"


def system(prompt: str, words: int, numbers_as_words: bool) -> dict[str, str]:
    """The system message of one of the prompts above. words: the length that is allowed."""
    style = STYLE + NUMBERS * numbers_as_words
    return {"role": "system", "content": prompt.format(words=words, style=style)}


def conversation(turns: Sequence[tuple[str, str]]) -> str:
    """Questions and replies as a text, for the model that plays the user."""
    lines = [f"User: {question}\nAssistant: {reply}" for question, reply in turns]
    return "\n".join([*lines, "What does the user say next?"])
