"""Tiny BLIP and chat models for tests, of transformers' real classes, saved to folders.

Their weights are random and seeded; a chat model may be taught answers by heart, so that the whole path runs on a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_qwen import byte_tokenizer, qwen_vl_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

WORDS = ("a", "the", "photo", "of", "grass", "tree", "lake", "night", "trail", "rock", "sky", "in", "on", "near", "with")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]


def build_tiny_blip(folder: Path, seed: int = 0) -> Path:
    """Write a captioner of 32 px and 2 layers per tower; captions are words of `WORDS`, by the image."""
    vocab = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(vocab), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=32)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(config)
        for parameter in model.parameters():  # the usual start is so flat that every image gets the same words
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(image_processor, BertTokenizer(vocab=vocab)).save_pretrained(folder)
    return folder


def build_tiny_chat(
    folder: Path, conversations: Sequence[tuple[str, str]] = (), *, template: str = TEMPLATE, positions: int = 4096
) -> Path:
    """Write a chat model of 2 layers.

    Args:
        folder: to be made.
        conversations: (message, answer) that it learns by heart; without any it answers at random.
        template: chat template; empty: none.
        positions: the longest text it can read and write, in tokens.
    """
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL,
        show_progress=False,
        min_frequency=1,
    )
    learned.train_from_iterator([text for pair in conversations for text in pair], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned, eos_token=SPECIAL[0], pad_token=SPECIAL[1])
    tokenizer.chat_template = template or None
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=positions,
                bos_token_id=None,
                eos_token_id=0,
                pad_token_id=1,
            )
        )
        if conversations:
            _learn(model, tokenizer, conversations)
    model.save_pretrained(folder)
    return folder


def build_tiny_vlm(folder: Path, family: str) -> Path:
    """Write a chat model that reads images: `qwen2.5-vl` or `llava`; its captions are random characters, by the image."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, processor = {"qwen2.5-vl": _qwen_vl, "llava": _llava}[family]()
        for parameter in model.parameters():  # as for BLIP
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    vocabulary = processor.tokenizer.get_vocab()
    unseen = [number for piece, number in vocabulary.items() if not (len(piece) == 1 and piece.isascii() and piece.isalpha())]
    model.generation_config.suppress_tokens = unseen  # letters only: other bytes make no text by themselves
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


VLM_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
VLM_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


def _vlm_tokenizer() -> tuple[Qwen2Tokenizer, dict[str, int]]:
    """Return a tokenizer of one token per byte, and its special tokens."""
    tokenizer = byte_tokenizer(VLM_SPECIAL, pad_token="<|endoftext|>")
    return tokenizer, {name.strip("<|>"): tokenizer.convert_tokens_to_ids(name) for name in VLM_SPECIAL}


def _qwen_vl() -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2VLProcessor]:
    tokenizer, ids = _vlm_tokenizer()
    config = qwen_vl_config(tokenizer, bos_token_id=None, eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"])
    template = VLM_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tokenizer, ids = _vlm_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=16),
        text_config=LlamaConfig(
            **sizes,
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=ids["im_end"],
            pad_token_id=ids["endoftext"],
        ),
        image_token_index=ids["image_pad"],
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=VLM_TEMPLATE.replace("IMAGE", "<|image_pad|>"),
    )
    return LlavaForConditionalGeneration(config), processor


def _learn(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: Sequence[tuple[str, str]]) -> None:
    """Train until every answer is known by heart."""
    rows = []
    for message, answer in conversations:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"][0]
        answered = torch.tensor([*tokenizer(answer)["input_ids"], 0])
        rows.append((torch.cat([asked, answered])[None], len(asked)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        worst = 0.0
        for tokens, start in rows:
            labels = tokens.clone()
            labels[:, :start] = -100
            loss = model(input_ids=tokens, labels=labels).loss
            loss.backward()
            worst = max(worst, loss.item())
        if worst < 0.02:
            return
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the tiny chat model did not learn its answers: loss {worst}")
