"""The pack's nodes: a schema and a few lines each."""

from __future__ import annotations

from comfy_api.latest import io

from .adapters import ApplyGSTLoRA, ApplySTLoRA, LoadAdapter
from .calibration import Calibrate, CalibratedStrength
from .fidelity_steering import FidelitySteering
from .layer_views import FindVitalLayers, ViewAttention
from .measures import MeasureSweep
from .photographs import EditFromTrajectory, InvertPhotograph, LoadTrajectory, SaveTrajectory
from .projectors import ApplyProjector, LoadProjector, ProjectorStrength
from .prompts import EncodeSubInstructions, SelectPhrase, SubInstructionStrengths
from .remembered_sources import InjectRememberedSource, RememberSource, RememberTrajectory
from .slider_prompt import SliderPrompt
from .stable_flow import InjectVitalLayers, SameNoise, StackPrompts
from .sweep_sheet import SweepSheet
from .sweeps import ImagesAtOnce, LatentForSweep, StrengthGrid, StrengthList, StrengthRange
from .training_free import ApplyTrainingFree, PromptDifference, VelocityBlending
from .where_and_when import WhereAndWhen

NODES: list[type[io.ComfyNode]] = [
    LoadAdapter,
    ApplySTLoRA,
    ApplyGSTLoRA,
    EncodeSubInstructions,
    SubInstructionStrengths,
    SelectPhrase,
    SliderPrompt,
    LoadProjector,
    ApplyProjector,
    ProjectorStrength,
    ApplyTrainingFree,
    VelocityBlending,
    FidelitySteering,
    PromptDifference,
    WhereAndWhen,
    StackPrompts,
    SameNoise,
    InjectVitalLayers,
    InvertPhotograph,
    EditFromTrajectory,
    SaveTrajectory,
    LoadTrajectory,
    RememberSource,
    RememberTrajectory,
    InjectRememberedSource,
    FindVitalLayers,
    ViewAttention,
    StrengthRange,
    StrengthList,
    StrengthGrid,
    LatentForSweep,
    MeasureSweep,
    Calibrate,
    CalibratedStrength,
    ImagesAtOnce,
    SweepSheet,
]
