"""Graphs in ComfyUI's API format with the tiny models."""

from __future__ import annotations

from typing import Any

Link = list  # [node id, output index]


class Graph(dict):
    """Node id -> node. Each method adds nodes, reusing an identical one, and returns the link to their output."""

    def add(self, class_type: str, output: int = 0, **inputs: Any) -> Link:
        entry = {"class_type": class_type, "inputs": inputs}
        node = next((key for key, value in self.items() if value == entry), f"{class_type}_{len(self)}")
        self[node] = entry
        return [node, output]

    def model(self, dtype: str = "default") -> Link:
        return self.add("UNETLoader", unet_name="tiny-kontext.safetensors", weight_dtype=dtype)

    def clip(self) -> Link:
        return self.add("TinyTestTextEncoders", clip_l="tiny-clip-l.safetensors", t5xxl="tiny-t5xxl.safetensors")

    def adapter(self, name: str) -> Link:
        return self.add("EditSlidersLoadAdapter", adapter_name=name)

    def stlora(self, model: Link, name: str = "selective_lora.pt", **more: Any) -> Link:
        return self.add("EditSlidersApplySTLoRA", model=model, adapter=self.adapter(name), **more)

    def gstlora(self, model: Link, strength: Any, name: str = "gst_peft.safetensors") -> Link:
        return self.add("EditSlidersApplyGSTLoRA", model=model, adapter=self.adapter(name), strength=strength)

    def projector(self, name: str = "slider_projector.pth", lora: str = "projector_lora.safetensors") -> Link:
        return self.add("EditSlidersLoadProjector", projector_name=name, lora_name=lora)

    def projected(self, model: Link, **files: str) -> Link:
        return self.add("EditSlidersApplyProjector", model=model, projector=self.projector(**files))

    def at(self, conditioning: Link, strength: Any, mode: str = "clamp to 0..1", **files: str) -> Link:
        """The conditioning with a projector strength."""
        return self.add(
            "EditSlidersProjectorStrength",
            conditioning=conditioning,
            projector=self.projector(**files),
            strength=strength,
            mode=mode,
        )

    def lora(self, model: Link, name: str = "plain_lora.safetensors", strength: float = 0.8) -> Link:
        return self.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)

    def stock_text(self, text: str, length: int | None = 512) -> Link:
        clip = self.clip()
        if length:
            clip = self.add("T5TokenizerOptions", clip=clip, min_padding=0, min_length=length)
        return self.add("CLIPTextEncode", clip=clip, text=text)

    def instructions(self, text: str, mode: str = "one per line", pad_to_512: bool = True) -> Link:
        return self.add(
            "EditSlidersEncodeSubInstructions", clip=self.clip(), text=text, mode=mode, pad_to_512=pad_to_512
        )

    def strengths(self, conditioning: Link, *values: Any, **more: Any) -> Link:
        inputs: dict[str, Any] = {f"strength_{k}": value for k, value in enumerate(values, 1)}
        return self.add("EditSlidersSubInstructionStrengths", conditioning=conditioning, **inputs, **more)

    def photo(self) -> Link:
        pixels = self.add("LoadImage", image="photo.png")
        return self.add("VAEEncode", pixels=pixels, vae=self.add("VAELoader", vae_name="taef1"))

    def edited(self, conditioning: Link, reference: bool = True) -> Link:
        if reference:
            conditioning = self.add("ReferenceLatent", conditioning=conditioning, latent=self.photo())
        return self.add("FluxGuidance", conditioning=conditioning, guidance=2.5)

    def noise(self, images: int = 1) -> Link:
        return self.add("EmptySD3LatentImage", width=64, height=64, batch_size=images)

    def sample(
        self, model: Link, positive: Link, negative: Link | None = None, latent: Link | None = None, **more: Any
    ) -> Link:
        inputs: dict[str, Any] = {
            "seed": 7,
            "steps": 2,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        }
        return self.add(
            "KSampler",
            model=model,
            positive=positive,
            negative=negative or positive,
            latent_image=latent or self.noise(),
            **(inputs | more),
        )

    def save(self, samples: Link) -> str:
        """Save latents; the node id for Result.latent."""
        return self.add("TinyTestSaveLatent", samples=samples)[0]
