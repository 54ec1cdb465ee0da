"""Ask: questions of a protocol with words of its own, put to an endpoint; none is asked twice.

Replies are kept in a Progress file as soon as they are there, beside the judge's own cache; what failed is not, so that
whoever starts the evaluation again asks for it again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dpo.digests import text_sha256
from dpo.evals.progress import Progress
from dpo.judge.endpoint import EndpointJudge, Reply
from models.template import Message


def ask(
    judge: EndpointJudge, questions: Mapping[str, Sequence[Message]], settings: Mapping[str, Any], path: Path
) -> dict[str, Reply]:
    """The reply to each question, by its id."""
    # Half a surrogate pair can stand in a JSON file and in no request.
    questions = {
        id: [{**message, "content": message["content"].encode("utf-8", "replace").decode()} for message in messages]
        for id, messages in questions.items()
    }
    texts = [text for id, messages in questions.items() for text in (id, *(m["content"] for m in messages))]
    key = {"judge": judge.name, "questions_sha256": text_sha256(texts), **settings}
    with Progress(path, key) as progress:
        wanted = [id for id in questions if id not in progress.done]
        replies = {id: Reply(**{k: v for k, v in row.items() if k != "id"}) for id, row in progress.done.items()}
        with tqdm(total=len(questions), initial=len(replies), desc=f"judge {judge.name}", unit="") as bar:

            def on_done(place: int, reply: Reply) -> None:
                if reply.outcome not in ("malformed", "http_error"):
                    progress.add({"id": wanted[place], **vars(reply)})
                bar.update()

            fresh = judge.chat([questions[id] for id in wanted], settings, on_done)
    return replies | dict(zip(wanted, fresh, strict=True))
