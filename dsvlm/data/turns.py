"""Conversations as LLaVA, ShareGPT and OpenAI write them, as pairs of question and answer."""

ROLES = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": "system"}
IMAGE = "<image>"  # LLaVA's mark in a question; ours always reads the image first


def read_turns(turns: list) -> tuple[str, list[tuple[str, str]]]:
    """(system text or "", [(question, answer), ...]) of a list of turns.

    turns: {"from": human | gpt | system, "value": text} (LLaVA, ShareGPT), or {"role": user | assistant | system,
    "content": text, or a list of {"type": "text", "text": ...} and one {"type": "image"}} (OpenAI). The mark of the
    image is left out, with the space around it. ValueError in few words, the same for all turns that are wrong in the
    same way, so that they can be counted.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError("no list of turns")
    spoken = [read_turn(turn) for turn in turns]
    system = spoken.pop(0)[1] if spoken[0][0] == "system" else ""
    if [role for role, _ in spoken] != ["question", "answer"] * (len(spoken) // 2) or not spoken:
        raise ValueError("questions and answers do not alternate, from a question to an answer")
    questions = [text for _, text in spoken[::2]]
    if sum(question.count(IMAGE) for question in questions) > 1:
        raise ValueError("several images in one conversation")
    questions = [unmarked(question) if IMAGE in question else question for question in questions]
    answers = [text for _, text in spoken[1::2]]
    if not all(answer.strip() for answer in answers):
        raise ValueError("an answer without text")
    if not all(question.strip() for question in questions[1:]):
        raise ValueError("a question without text, behind an answer")
    return system, list(zip(questions, answers, strict=True))


def unmarked(question: str) -> str:
    """A question without the mark of its image, and without the space around that."""
    return " ".join(part.strip() for part in question.split(IMAGE) if part.strip())


def read_turn(turn) -> tuple[str, str]:
    """(question | answer | system, text) of one turn."""
    if not isinstance(turn, dict):
        raise ValueError("a turn that is no object")
    role = turn["from"] if "from" in turn else turn.get("role")
    text = turn["value"] if "value" in turn else turn.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"the role {role!r:.40}, which is none of {', '.join(ROLES)}")
    if isinstance(text, list):
        text = "".join(read_part(part) for part in text)
    if not isinstance(text, str):
        raise ValueError("a turn without text")
    return ROLES[role], text


def read_part(part) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image", "image_url"):
        return IMAGE
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"content of the type {kind!r:.40}, which is neither text nor image")
    return part["text"]
