"""Types of the pack's own sockets."""

from __future__ import annotations

from comfy_api.latest import io

AdapterSocket = io.Custom("SLIDER_ADAPTER")
ProjectorSocket = io.Custom("SLIDER_PROJECTOR")
StrengthsSocket = io.Custom("SLIDER_STRENGTHS")
TrajectorySocket = io.Custom("SLIDER_TRAJECTORY")
KVCacheSocket = io.Custom("SLIDER_REMEMBERED_SOURCE")
