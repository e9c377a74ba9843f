"""The tab of the blind reading test: is a patch real or drawn, and which subtype does it show?"""

from __future__ import annotations

import math
from html import escape
from typing import Any

import gradio as gr
import pandas as pd

from counterstain.app.server import Studio, handled, person_of, picture, table_of
from counterstain.audit.reading_test import CONFIDENCES
from counterstain.data.overlays import resized
from counterstain.errors import InputError

REAL, DRAWN, NOT_SAID = "real", "drawn", "not said"
SHOWN_PX = 512
SHARES = {
    "accuracy": "Real or drawn, right",
    "drawn_found": "Drawn called drawn",
    "real_found": "Real called real",
    "subtype_of_real": "Subtype of real patches seen as annotated",
    "subtype_of_drawn": "Subtype of drawn patches seen as asked for",
}


class Tab:
    """The parts of the tab and what they do; which question comes next follows from the answers that are kept."""

    def __init__(self, studio: Studio, person: gr.Textbox) -> None:
        assert studio.reading is not None
        self.test, self.person = studio.reading, person
        tissue = escape(self.test.header.taxonomy.tissue_class)
        gr.HTML(
            f"<p>Is each patch real or drawn, and which subtype does most of its {tissue} show? Answers are kept at "
            "once and are final; come back under the same name to go on.</p>"
        )
        self.start = gr.Button("Begin or go on", size="md", elem_id="begin")
        self.progress = gr.HTML("", elem_id="reading-progress")
        self.question = gr.State(None)
        with gr.Row(visible=False) as self.asked:
            with gr.Column(scale=4, min_width=320):
                across = f"{self.test.header.size_px * self.test.header.mpp:.4g} µm across"
                self.picture = picture(f"Patch, {across}: real or drawn?", elem_id="question")
            with gr.Column(scale=3, min_width=300):
                self.kind = gr.Radio([REAL, DRAWN], label="Is it real or drawn?", elem_id="kind")
                self.subtype = gr.Radio(list(self.test.subtypes), label="Which subtype?", elem_id="seen")
                confidences = [NOT_SAID, *map(str, CONFIDENCES)]
                self.confidence = gr.Radio(
                    confidences, value=NOT_SAID, label="How sure are you? (1 = a guess, 5 = certain)"
                )
                self.answer = gr.Button("Answer", variant="primary", elem_id="answer")
        self.result = gr.HTML("", elem_id="reading-result", elem_classes="table")
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        shown = [
            self.question, self.asked, self.picture, self.kind, self.subtype, self.confidence, self.progress,
            self.result,
        ]  # fmt: skip
        given = [self.person, self.question, self.kind, self.subtype, self.confidence]
        self.start.click(handled(self.begun), self.person, shown, **private)
        self.answer.click(handled(self.answered), given, shown, **private)

    def begun(self, person: str, request: gr.Request) -> list[Any]:
        """Show the first question that is not answered."""
        return self._next(person_of(person, request))

    def answered(  # noqa: PLR0917 - in the order of the controls
        self,
        person: str,
        question: int | None,
        kind: str | None,
        subtype: str | None,
        confidence: str,
        request: gr.Request,
    ) -> list[Any]:
        """Keep an answer and show the next question."""
        reader = person_of(person, request)
        if question is None or question != self.test.next_question(reader):
            return self._next(reader)  # another name, or answered on another page
        if kind not in {REAL, DRAWN} or subtype is None:
            raise InputError("choose real or drawn, and a subtype")
        sure = None if confidence == NOT_SAID else int(confidence)
        self.test.answer(reader, question, drawn=kind == DRAWN, subtype=subtype, confidence=sure)
        return self._next(reader)

    def _next(self, reader: str) -> list[Any]:
        done, total = self.test.progress(reader)
        progress = f"<p>{done} of {total} answered by {escape(reader)}</p>"
        question = self.test.next_question(reader)
        if question is None:
            return [None, gr.Row(visible=False), None, None, None, NOT_SAID, progress, self._result(reader)]
        image = self.test.image(question)
        factor = max(1, SHOWN_PX // len(image))
        shown = resized(image, (image.shape[1] * factor, image.shape[0] * factor))
        return [question, gr.Row(visible=True), shown, None, None, NOT_SAID, progress, ""]

    def _result(self, reader: str) -> str:
        """Return how a reader who is through did, as HTML."""
        from counterstain.audit.reading_result import score_readers

        result = score_readers(self.test)
        row = result.readers[result.readers["reader"] == reader].iloc[0]
        shares = table_of(["Answers", "Share (95 % interval)"], [[w, _percent(row, n)] for n, w in SHARES.items()])
        counts = result.confusion[result.confusion["reader"] == reader]
        return (
            f"<h3>Result of {escape(reader)}</h3><p>By chance half of the answers to real or drawn are right, "
            f"and d' is 0; here it is {row['d_prime']:.2f}.</p>{shares}"
            + "".join(self._confusion(counts[counts["kind"] == kind], kind) for kind in (REAL, DRAWN))
        )

    def _confusion(self, counts: pd.DataFrame, kind: str) -> str:
        """Return the answers by shown (row) and seen subtype as an HTML table."""
        table = counts.pivot_table(index="shown", columns="answered", values="answers", aggfunc="sum").fillna(0)
        table = table.reindex(columns=list(self.test.subtypes), fill_value=0).astype(int)
        head = ["asked for" if kind == DRAWN else "annotated", *(f"seen as {name}" for name in table.columns)]
        rows = ([str(name), *map(str, row)] for name, row in zip(table.index, table.to_numpy().tolist(), strict=True))
        return f"<h4>Subtypes seen in {kind} patches</h4>{table_of(head, rows)}"


def _percent(row: pd.Series, name: str) -> str:
    value, low, high = (100 * float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return "-" if math.isnan(value) else f"{value:.0f} % ({low:.0f} to {high:.0f} %)"
