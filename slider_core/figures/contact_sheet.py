"""A sweep as one image, with captions, or as an animation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

GAP = 6
CAPTION_HEIGHT = 36
FONT_SIZE = 22
FRAME_MILLISECONDS = 120
_EXIF_MODEL, _EXIF_MAKE = 0x0110, 0x010F  # EXIF tags in which ComfyUI stores prompt and workflow


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], num_columns: int, title: str = ""
) -> Image.Image:
    """The images in rows of num_columns, each with its caption below, and a title above the sheet.

    All images are resized to the size of the first. A title that the font cannot draw is left out.
    """
    width, height = images[0].size
    title = title if _can_draw(title) else ""
    num_rows = -(-len(images) // num_columns)
    top = CAPTION_HEIGHT if title else 0
    column_width, row_height = width + GAP, height + CAPTION_HEIGHT
    sheet = Image.new("RGB", (num_columns * column_width - GAP, top + num_rows * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((sheet.width // 2, top // 2), title, "gray", _fitting_font(title, sheet.width), anchor="mm")
    font = _fitting_font(max(captions, key=len), width)
    for k, (image, caption) in enumerate(zip(images, captions)):
        left, upper = k % num_columns * column_width, top + k // num_columns * row_height
        sheet.paste(image.resize((width, height)), (left, upper))
        center = (left + width // 2, upper + height + CAPTION_HEIGHT // 2)
        draw.text(center, caption, "black", font, anchor="mm")
    return sheet


def encode_png(image: Image.Image, metadata: Mapping[str, str]) -> bytes:
    """A PNG file. metadata: text chunks, as ComfyUI writes them ('workflow' and 'prompt': JSON)."""
    info = PngInfo()
    for name, value in metadata.items():
        info.add_text(name, value)
    return _encode(image, "PNG", pnginfo=info)


def encode_webp(images: Sequence[Image.Image], metadata: Mapping[str, str]) -> bytes:
    """A WebP animation that plays the images forward and backward in a loop. metadata: as in encode_png, as EXIF."""
    forward_and_backward = [*images, *images[-2:0:-1]]
    frames = [image.convert("RGB").resize(images[0].size) for image in forward_and_backward]
    exif = Image.Exif()
    for tag, name in ((_EXIF_MODEL, "prompt"), (_EXIF_MAKE, "workflow")):
        if name in metadata:
            exif[tag] = f"{name}:{metadata[name]}"
    options = {"save_all": True, "append_images": frames[1:], "duration": FRAME_MILLISECONDS, "loop": 0, "quality": 90}
    return _encode(frames[0], "WEBP", exif=exif, **options)


def _encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _can_draw(text: str) -> bool:
    """Whether the font has a glyph for every character; it has none for Chinese, for example."""
    font = ImageFont.load_default(size=FONT_SIZE)
    missing = bytes(font.getmask("\uffff"))
    return all(char.isspace() or bytes(font.getmask(char)) != missing for char in text)


def _fitting_font(text: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font in FONT_SIZE, or smaller if the text would be wider than `width`."""
    font = ImageFont.load_default(size=FONT_SIZE)
    text_width = font.getlength(text)
    return font if text_width <= width else ImageFont.load_default(size=max(FONT_SIZE * width / text_width, 6))
