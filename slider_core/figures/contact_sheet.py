"""A sweep as one picture: side by side with captions, or as an animation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

GAP = 6
CAPTION_HEIGHT = 36
FONT_SIZE = 22
FRAME_MILLISECONDS = 120
_CAMERA_MODEL, _CAMERA_MAKER = 0x0110, 0x010F  # EXIF tags in which ComfyUI keeps prompt and workflow


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int, heading: str = ""
) -> Image.Image:
    """The pictures in rows of `columns`, each with its caption under it; columns = their number gives a strip."""
    width, height = pictures[0].size
    heading = heading if _can_draw(heading) else ""
    rows = -(-len(pictures) // columns)
    top = CAPTION_HEIGHT if heading else 0
    across, down = width + GAP, height + CAPTION_HEIGHT
    sheet = Image.new("RGB", (columns * across - GAP, top + rows * down), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((sheet.width // 2, top // 2), heading, "gray", _font(heading, sheet.width), anchor="mm")
    small = _font(max(captions, key=len), width)
    for k, (picture, caption) in enumerate(zip(pictures, captions)):
        left, upper = k % columns * across, top + k // columns * down
        sheet.paste(picture.resize((width, height)), (left, upper))
        middle = (left + width // 2, upper + height + CAPTION_HEIGHT // 2)
        draw.text(middle, caption, "black", small, anchor="mm")
    return sheet


def png(picture: Image.Image, metadata: Mapping[str, str]) -> bytes:
    """As a PNG file with ComfyUI's metadata ('workflow' and 'prompt': JSON)."""
    info = PngInfo()
    for name, value in metadata.items():
        info.add_text(name, value)
    return _file(picture, "PNG", pnginfo=info)


def animated_webp(pictures: Sequence[Image.Image], metadata: Mapping[str, str]) -> bytes:
    """A WebP that runs through the pictures and back, for ever, with ComfyUI's metadata."""
    there_and_back = [*pictures, *pictures[-2:0:-1]]
    frames = [picture.convert("RGB").resize(pictures[0].size) for picture in there_and_back]
    exif = Image.Exif()
    for tag, name in ((_CAMERA_MODEL, "prompt"), (_CAMERA_MAKER, "workflow")):
        if name in metadata:
            exif[tag] = f"{name}:{metadata[name]}"
    rest = {"save_all": True, "append_images": frames[1:], "duration": FRAME_MILLISECONDS, "loop": 0, "quality": 90}
    return _file(frames[0], "WEBP", exif=exif, **rest)


def _file(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _can_draw(text: str) -> bool:
    """Whether the font has all these letters; it has none of Chinese, for example."""
    font = ImageFont.load_default(size=FONT_SIZE)
    missing = bytes(font.getmask("\uffff"))
    return all(char.isspace() or bytes(font.getmask(char)) != missing for char in text)


def _font(text: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The usual one, smaller where the text would be wider than there is room."""
    usual = ImageFont.load_default(size=FONT_SIZE)
    needed = usual.getlength(text)
    return usual if needed <= width else ImageFont.load_default(size=max(FONT_SIZE * width / needed, 6))
