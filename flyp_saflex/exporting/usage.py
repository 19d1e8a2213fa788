"""Python of the model cards: it loads an exported folder and classifies one image."""

from __future__ import annotations

_CLASSES = 'classes = json.loads(Path("FOLDER/classes.json").read_text())\n'
_TEXTS = '[classes["templates"][0].format(name) for name in classes["class_names"]]'
_HEAD = 'head = load_file("FOLDER/head.safetensors")\n'
_LAST = 'print(classes["class_names"][int(logits.argmax())])'
_LINEAR = 'logits = features @ head["weight"].T + head["bias"]\n'

_OPEN_CLIP = """\
import json
from pathlib import Path

import open_clip
import torch
from PIL import Image
{imports}
model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")
{prepare}with torch.no_grad():
    features = model.encode_image(preprocess(Image.open("image.jpg").convert("RGB"))[None], normalize=True)
    {logits}"""
_TRANSFORMERS = """\
import json
from pathlib import Path

import torch
from PIL import Image
{imports}from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("FOLDER"), CLIPProcessor.from_pretrained("FOLDER")
{prepare}inputs = processor({texts}images=Image.open("image.jpg").convert("RGB"), return_tensors="pt"{padding})
with torch.no_grad():
    {logits}"""

OPEN_CLIP = (
    _OPEN_CLIP.format(
        imports="",
        prepare=f'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")\n{_CLASSES}texts = tokenizer({_TEXTS})\n',
        logits="logits = model.logit_scale.exp() * features @ model.encode_text(texts, normalize=True).T\n",
    )
    + _LAST
)
OPEN_CLIP_HEAD = (
    _OPEN_CLIP.format(
        imports="from safetensors.torch import load_file\n",
        prepare=_CLASSES + _HEAD,
        logits=_LINEAR,
    )
    + _LAST
)
TRANSFORMERS = (
    _TRANSFORMERS.format(
        imports="",
        prepare=f"{_CLASSES}texts = {_TEXTS}\n",
        texts="text=texts, ",
        padding=", padding=True",
        logits="logits = model(**inputs).logits_per_image\n",
    )
    + _LAST
)
TRANSFORMERS_HEAD = (
    _TRANSFORMERS.format(
        imports="from safetensors.torch import load_file\n",
        prepare=_CLASSES + _HEAD,
        texts="",
        padding="",
        logits="embeddings = model.visual_projection(model.vision_model(**inputs).pooler_output)\n"
        f"    features = torch.nn.functional.normalize(embeddings, dim=1)\n    {_LINEAR}",
    )
    + _LAST
)
ONNX = f"""\
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

{_CLASSES}prepare = classes["preprocess"]  # "resize_mode": "squash" is image.resize instead of ImageOps.fit
size = np.broadcast_to(prepare["size"], 2).tolist()
image = ImageOps.fit(Image.open("image.jpg").convert("RGB"), size, Image.Resampling[prepare["interpolation"].upper()])
pixels = (np.asarray(image, dtype=np.float32) / 255 - prepare["mean"]) / prepare["std"]
session = onnxruntime.InferenceSession("FOLDER/model.onnx")  # images [N, 3, S, S] -> logits, embeddings
logits, embeddings = session.run(None, {{"images": pixels.transpose(2, 0, 1)[None].astype(np.float32)}})
{_LAST}"""
