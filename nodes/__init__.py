"""The pack's nodes: a schema and a few lines each."""

from __future__ import annotations

from comfy_api.latest import io

from .adapters import ApplyGSTLoRA, ApplySTLoRA, LoadAdapter
from .calibration import Calibrate, CalibratedStrength
from .flowslider import FidelitySteering
from .inversion import EditFromTrajectory, InvertPhotograph, LoadTrajectory, SaveTrajectory
from .layer_analysis import FindVitalLayers, ViewAttention
from .mask_and_schedule import WhereAndWhen
from .prompts import EncodeSubInstructions, SelectPhrase, SubInstructionStrengths
from .slider_prompt import SliderPrompt
from .source_kv_cache import InjectRememberedSource, RememberSource, RememberTrajectory
from .stable_flow import InjectVitalLayers, SameNoise, StackPrompts
from .strength_projector import ApplyProjector, LoadProjector, ProjectorStrength
from .sweep_metrics import MeasureSweep
from .sweep_sheet import SweepSheet
from .sweeps import ImagesAtOnce, LatentForSweep, StrengthGrid, StrengthList, StrengthRange
from .training_free import ApplyTrainingFree, PromptDifference, VelocityBlending

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
