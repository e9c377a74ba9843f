"""The tab that compares two arms of a study, region by region, those first where they differ most."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from counterstain.api.evaluation import arm_chosen_by_validation, compare_arms
from counterstain.app.server import Studio, handled, legend, picture
from counterstain.errors import InputError
from counterstain.progress import steps_heard
from counterstain.study.compare import ComparedRegion, arms_of

PICTURES = ("Image", "Annotation, by subtype", "Found by the baseline", "Found by the arm", "Where they differ")


class Tab:
    """The parts of the tab and what they do; what was compared is kept in the session."""

    def __init__(self, studio: Studio) -> None:
        assert studio.study is not None
        self.run = studio.study
        arms = arms_of(self.run)
        if len(arms) < 2:
            raise InputError(f"{self.run}: has one arm; there is nothing to compare")
        gr.HTML(legend(studio.cohort.taxonomy))
        with gr.Row(equal_height=True):
            baseline, chosen = "subtype" if "subtype" in arms else arms[0], arm_chosen_by_validation(self.run)
            others = [name for name in arms if name not in {baseline, chosen}]
            named = [(f"{name} (chosen by validation)" if name == chosen else name, name) for name in arms]
            self.baseline = gr.Dropdown(arms, value=baseline, label="Baseline", min_width=200)
            self.arm = gr.Dropdown(named, value=chosen or others[0], label="Arm", elem_id="arm", min_width=220)
            parts = [("validation", "val"), ("test (put on record)", "test")]
            self.split = gr.Radio(parts, value="val", label="Part", min_width=260)
        self.compare = gr.Button("Compare", variant="primary", elem_id="compare-arms")
        self.found = gr.State([])
        self.region = gr.Dropdown(
            [], label="Region, and the share of its pixels on which the two differ", elem_id="compared"
        )
        self.about = gr.HTML("", elem_id="difference")
        with gr.Row(elem_classes="equal"):
            self.pictures = []
            for name in PICTURES:
                with gr.Column(min_width=220):
                    self.pictures.append(picture(name))
        shown = [self.about, *self.pictures]
        self.compare.click(
            handled(self.compared), [self.baseline, self.arm, self.split], [self.found, self.region, *shown],
            api_visibility="private", concurrency_id="drawing", show_progress_on=[self.about],
        )  # fmt: skip
        self.region.input(
            handled(self.filled), [self.found, self.region], shown, api_visibility="private", show_progress="hidden"
        )

    def compared(
        self,
        baseline: str,
        arm: str,
        split: str,
        progress: Any = gr.Progress(),  # noqa: B008 - handed over like this
    ) -> list[Any]:
        """Compare two arms on all regions, and show the first."""
        with steps_heard(lambda done, total: progress((done, total), desc="comparing", unit="regions")):
            found = compare_arms(self.run, baseline=baseline, arm=arm, split=split)
        choices = [(f"{one.region}: {100 * one.disagreement:.1f} %", i) for i, one in enumerate(found)]
        return [found, gr.Dropdown(choices, value=0 if found else None), *self.filled(found, 0)]

    def filled(self, found: list[ComparedRegion], number: int) -> list[Any]:
        """Show a region."""
        if number not in range(len(found)):
            return ["", *[None] * len(PICTURES)]
        region = found[number]
        parts = "; ".join(
            f'<span style="color: rgb{colour}">■</span> {name} alone is right: {escape(arm)}, {100 * share:.1f} %'
            for name, (arm, (colour, share)) in zip(("arm", "baseline"), region.colours.items(), strict=True)
        )
        about = f"<p>{escape(f'{region.region} of slide {region.slide}')}: {parts} of the pixels</p>"
        outlines = [region.outlined("baseline"), region.outlined("arm")]
        return [about, region.image, region.reference(), *outlines, region.difference()]
