"""Import this before ComfyUI's modules: it configures ComfyUI for gradients, as the trainer does."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from training.comfyui import use_comfyui

use_comfyui(None, cpu=not torch.cuda.is_available())
