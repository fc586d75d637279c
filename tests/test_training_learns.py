"""Training achieves the papers' objectives, measured on images and prompts that were not trained on."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_management
import folder_paths
import pytest
import torch
from accelerate import Accelerator
from support.tiny_models import write_tiny_models
from support.training_run import INSTRUCTIONS, write_config, write_edit_strips, write_images

from training.collate import micro_batches
from training.config import read_config
from training.objectives import Batch
from training.run import Run

UNSEEN = 10**6
"""A step beyond every run, so its noise and sigmas are new."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning")
    write_tiny_models(folder / "models")
    for part in (folder / "models").iterdir():
        if part.is_dir():
            folder_paths.add_model_folder_path(part.name, str(part))
    write_images(folder / "images", 8)
    write_edit_strips(folder / "edit_strips", 6)
    return folder


@pytest.fixture(autouse=True)
def in_training(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "in_training", True)


@dataclass
class Learned:
    run: Run
    losses: list[float]
    validation: list[Batch]

    def distance(self, changes) -> float:
        """Mean loss on the validation samples. changes: batch -> forward wrappers."""
        total = count = 0.0
        for batch in self.validation:
            objective, base = self.run.objective, self.run.model
            with torch.no_grad(), base.patched(changes(batch)):
                velocity = objective.velocity(base, batch, batch.text)
            total += objective.losses(velocity, objective.target_velocity(base, batch)).sum().item()
            count += len(batch.samples)
        return total / count


def learned(place, name: str, **changes) -> Learned:
    """A completed run, with samples of its validation examples."""
    data = {
        "type": "combinations",
        "images": "images",
        "instructions": INSTRUCTIONS,
        "num_examples": 120,
        "num_validation": 8,
    }
    settings = {"data": data, "adapter": {"rank": 8}, "optimizer": {"learning_rate": 3e-3}, **changes}
    config = read_config(write_config(place, {"name": name, "output": f"out_{name}", **settings}))
    run = Run.prepare(config, Accelerator(cpu=True), lambda *_: None)
    samples = [run.objective.make_sample(e, UNSEEN + k, k) for k in range(3) for e in run.examples.validation]
    run.cache.fill_texts([p for sample in samples for p in (sample.prompt, sample.teacher or ())], lambda *_: None)
    validation = list(micro_batches(samples, run.cache, run.model, 8))
    losses = []
    while run.step < config.run.steps:
        losses.append(run.train_step()[0])
        run.step += 1
    return Learned(run, losses, validation)


def fell(losses: list[float], to: float) -> bool:
    tenth = len(losses) // 5
    return sum(losses[-tenth:]) < to * sum(losses[:tenth])


def test_an_stlora_suppresses_the_instructions_that_it_acts_on(place):
    """PPS on random weights: the loss falls, and predictions for new prompts are as if the instruction were missing."""
    it = learned(
        place, "pps", run={"steps": 150, "batch_size": 8, "micro_batch_size": 8, "gradient_checkpointing": False}
    )
    assert fell(it.losses, 0.8)

    def at_strength_0(batch):  # as Apply STLoRA has it: the adapter once on the tokens of what is to be deleted
        scale = torch.zeros(batch.text.states.shape[:2])
        for image, (sample, tokens) in enumerate(zip(batch.samples, batch.tokens)):
            for instruction in sample.suppressed:
                scale[image, list(tokens[instruction])] = 1.0
        return it.run.trainables.lora.forward_wrappers(scale)

    assert it.distance(at_strength_0) < 0.8 * it.distance(lambda _: {})

    lora, partly = it.run.trainables.lora, []
    for batch in it.validation:
        some = [k for k, sample in enumerate(batch.samples) if sample.teacher]
        partly.append(only(batch, some))
    it.validation = [batch for batch in partly if batch.samples]

    def everywhere(batch):
        return lora.forward_wrappers(torch.ones(batch.text.states.shape[:2]))

    def on_the_others(batch):
        kept = [s._replace(suppressed=tuple(set(range(len(s.prompt))) - set(s.suppressed))) for s in batch.samples]
        return it.run.objective.forward_wrappers(batch._replace(samples=kept))

    chosen = it.distance(it.run.objective.forward_wrappers)
    assert chosen < 0.97 * it.distance(everywhere)
    assert chosen < 0.97 * it.distance(on_the_others)


def only(batch: Batch, places: list[int]) -> Batch:
    def pick(text):
        return None if text is None else type(text)(*(part[places] for part in text))

    return Batch(
        samples=[batch.samples[k] for k in places],
        source_latent=batch.source_latent[places],
        target_latent=batch.target_latent[places],
        noise=batch.noise[places],
        sigma=batch.sigma[places],
        text=pick(batch.text),
        teacher=pick(batch.teacher),
        tokens=[batch.tokens[k] for k in places],
    )


def test_a_gstlora_makes_every_instruction_neutral(place):
    """SPPS on random weights."""
    it = learned(
        place,
        "spps",
        method="gstlora",
        run={"steps": 60, "batch_size": 8, "micro_batch_size": 8, "gradient_checkpointing": False},
    )
    assert fell(it.losses, 0.8)
    assert it.distance(it.run.objective.forward_wrappers) < 0.8 * it.distance(lambda _: {})


def test_a_projector_tells_strengths_apart(place):
    """Flow matching, mostly at high noise, on images that redden: the true strength predicts a sample best."""
    it = learned(
        place,
        "projector",
        method="projector",
        data={"type": "edit_strips", "path": "edit_strips", "num_validation": 2},
        objective={"strength_dropout": 0.0, "timestep_sampling": "logit_normal", "logit_mean": 2.0},
        run={"steps": 120, "batch_size": 8, "micro_batch_size": 8, "gradient_checkpointing": False},
    )
    assert fell(it.losses, 0.8)

    def at(move):
        def forward_wrappers(batch):
            moved = [sample._replace(strength=move(sample.strength)) for sample in batch.samples]
            return it.run.objective.forward_wrappers(batch._replace(samples=moved))

        return forward_wrappers

    right = it.distance(at(lambda s: s))
    assert right < 0.95 * it.distance(at(lambda s: 1 - s))
    assert right < 0.99 * it.distance(at(lambda _: 0.5))
