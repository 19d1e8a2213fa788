"""The command `flyp-saflex prompts`: captions of training images -> domain descriptions -> a file of edit texts.

ALIA's first half (arXiv 2305.16289): a captioner describes a sample of the training images, a language model summarises
the captions into domains that name no class, and each domain becomes an instruction and a prompt. Only training images
are used: the edit texts must not depend on the test set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flyp_saflex.config import Config
from flyp_saflex.data.registry import load_dataset
from flyp_saflex.errors import ConfigError, DataError, ModelError
from flyp_saflex.images.decode import read_image
from flyp_saflex.offline import PromptsConfig
from flyp_saflex.prompting.captions import Caption, draw, draw_captions, read_captions
from flyp_saflex.prompting.domains import PREPOSITIONS, Answer, complaint, parse, request
from flyp_saflex.prompting.edit_prompts import EditPrompts, EditText, check_target, write_edit_prompts
from flyp_saflex.prompting.language_models import BY_HAND, Captioner, ChatModel
from flyp_saflex.records import Dataset, Sample
from flyp_saflex.user_text import quoted

SHOWN = 8
"""Number of problems that are printed one by one."""
NEGATIVE = (
    "a photo of a scene",
    "a photo of geometric shapes",
    "a photo",
    "an image",
    "a black photo",
    "a blurred picture of nothing",
)
"""The semantic filter's negative texts, most of them ALIA's; not its `a photo of an object`, for classes may be objects."""


def prompts(config: Config, *, force: bool = False, limit: int | None = None, dry_run: bool = False) -> Path:
    """Write prompts/<data.name>.<prompts.name>.toml in the current folder and return its path.

    With several processes only the main one does the work.

    Args:
        config: the recipe.
        force: replace a file that is there.
        limit: at most this many training images to choose from.
        dry_run: run all checks, load no model, write nothing.

    Raises:
        ConfigError: `prompts.name` cannot be a file name.
        DataError: the dataset or the captions are wrong, or the file is there already.
        ModelError: a model cannot be loaded, or its answers cannot be used.
    """
    options = config.prompts
    if not re.fullmatch(r"[\w-]+", options.name):
        raise ConfigError(f"prompts.name = '{options.name}' goes into a file name: expected letters, digits, _ and -")
    path = Path("prompts") / f"{config.data.name}.{options.name}.toml"
    conditions = conditions_of(options)
    if os.environ.get("RANK", "0") != "0":
        return path
    check_target(path, force=force)
    dataset = load_dataset(config.data, seed=config.seed, limit=limit)
    if not options.max_domains:
        if not dry_run:
            _write(path, config, dataset, conditions, (), {"seed": config.seed}, force=force)
        else:
            print(f"would write {path} with {len(conditions)} conditions of prompts.conditions; no model is asked")
        return path
    if options.captions:
        captions = draw_captions(read_captions(Path(options.captions), dataset), dataset, options.num_captions, config.seed)
        source = f"{len(captions)} captions of {options.captions}"
    else:
        samples = draw(dataset.train.samples, options.num_captions, config.seed)
        source = f"captions by {options.captioner} of {len(samples)} of {len(dataset.train)} training images"
    if dry_run:
        beside = f" beside {len(conditions)} conditions" if conditions else ""
        print(f"would take {source}, have {options.llm} name at most {options.max_domains} domains{beside}, and write {path}")
        return path
    model = ChatModel(options.llm, options.llm_revision, options.precision)  # a wrong name shows before images are captioned
    made: dict[str, Any] = {"seed": config.seed}
    if options.captions:
        made["captions_file"] = options.captions
    else:
        captioner = Captioner(options.captioner, options.captioner_revision, options.precision)
        made |= {"captioner": captioner.name, "captioner_revision": captioner.revision}
        captions = caption_images(captioner, samples, options.batch_size, crop=config.data.box_crop)
        del captioner  # its memory is wanted by the language model
    print(f"{source}, for example: '{captions[0].text}'")
    made |= {"llm": model.name, "llm_revision": model.revision}
    domains, answers = ask(model, [caption.text for caption in captions], dataset.class_names, options)
    made["answers"] = [answer.text for answer in answers]
    made["captions"] = [
        {"path": row.sample_id, "caption": row.text} if row.sample_id else {"caption": row.text} for row in captions
    ]
    _write(path, config, dataset, conditions, domains, made, force=force)
    return path


def conditions_of(options: PromptsConfig) -> tuple[str, ...]:
    """Return the conditions that the user names, checked.

    Raises:
        ConfigError: one is empty, has braces or several lines, or is there twice; or there is nothing to write.
    """
    conditions = options.conditions
    for condition in conditions:
        if condition != condition.strip() or not condition.isprintable() or not condition or set(condition) & set("{}"):
            raise ConfigError(
                f"prompts.conditions: {quoted(repr(condition))}, expected one line of words such as 'at dusk', without {{}} and "
                "spaces around it"
            )
        if [other.casefold() for other in conditions].count(condition.casefold()) > 1:
            raise ConfigError(f"prompts.conditions: '{quoted(condition)}' is there twice; remove one")
    if not options.max_domains and not conditions:
        raise ConfigError("prompts.max_domains = 0 and prompts.conditions = [] leave nothing to write: set one of them")
    return conditions


def edit_text(domain: str) -> EditText:
    """Return instruction and prompt of a domain; one that begins with no preposition (`infrared at night`) is what it becomes."""
    if domain.partition(" ")[0].casefold() in PREPOSITIONS:
        return EditText(domain=domain, instruction=f"put the {{}} {domain}", prompt=f"a photo of a {{}} {domain}")
    return EditText(domain=domain, instruction=f"make it {domain}", prompt=f"a photo of a {{}}, {domain}")


def _write(
    path: Path,
    config: Config,
    dataset: Dataset,
    conditions: Sequence[str],
    domains: Sequence[str],
    made: dict[str, Any],
    *,
    force: bool,
) -> None:
    """Write the edit texts: conditions first, then the domains that are not among them."""
    named = {condition.casefold() for condition in conditions}
    edits = tuple(edit_text(name) for name in [*conditions, *(name for name in domains if name.casefold() not in named)])
    if conditions:
        made["conditions"] = list(conditions)
    texts = EditPrompts(
        dataset=config.data.name, edits=edits, positive=dataset.templates[:1], negative=NEGATIVE, made=made, path=path
    )
    write_edit_prompts(texts, path, force=force)
    print("\n".join(f"  {edit.instruction}" for edit in edits))
    print(f"{len(edits)} edit texts in {path}: read and edit them, then run flyp-saflex generate with editor.prompts={path}")


def caption_images(captioner: Captioner, samples: Sequence[Sample], batch_size: int, *, crop: bool = False) -> list[Caption]:
    """Caption images; skip and count those that cannot be read or get an empty caption.

    Args:
        captioner: the model.
        samples: their images.
        batch_size: images per forward pass.
        crop: crop an image to its box, as training does with `data.box_crop`.

    Raises:
        DataError: no image can be read.
        ModelError: no image gets a caption.
    """
    captions: list[Caption] = []
    unreadable: list[str] = []
    with tqdm(total=len(samples), unit="image", desc="captions", disable=None) as bar:
        for start in range(0, len(samples), batch_size):
            batch, images = samples[start : start + batch_size], {}
            for sample in batch:
                try:
                    images[sample.sample_id] = read_image(sample.image, box=sample.box if crop else None)
                except DataError as error:
                    unreadable.append(str(error))
            if images:
                captions += map(_caption, images, captioner(list(images.values())))
            bar.update(len(batch))
    if unreadable:
        print(f"{len(unreadable)} of {len(samples)} images cannot be read and are left out:")
        print("\n".join(f"  {reason}" for reason in unreadable[:SHOWN]))
    if len(unreadable) == len(samples):
        raise DataError(f"none of the {len(samples)} images drawn can be read, first: {unreadable[0]}")
    used = [caption for caption in captions if caption.text]
    if len(used) < len(captions):
        print(f"{len(captions) - len(used)} images got an empty caption and are left out")
    if not used:
        raise ModelError(
            f"prompts.captioner = '{captioner.name}' gave empty captions only: take another model, or give prompts.captions"
        )
    return used


def _caption(sample_id: str, text: str) -> Caption:
    return Caption(sample_id=sample_id, text=text)


def ask(
    model: ChatModel, captions: Sequence[str], class_names: Sequence[str], options: PromptsConfig
) -> tuple[tuple[str, ...], list[Answer]]:
    """Ask the language model for domains, and ask again while an answer has wrong lines.

    Returns:
        The domains of the answer with the most of them (of two such the later), and all answers.

    Raises:
        ModelError: no answer had a valid domain.
    """
    question = request(captions, class_names, options.max_domains)
    answers: list[Answer] = []
    for attempt in range(1, options.attempts + 1):
        text, complete = model.answer(question + (complaint(answers[-1]) if answers else ""), options.max_new_tokens)
        answer = parse(text, class_names, options.max_domains, complete=complete)
        answers.append(answer)
        print(
            f"answer {attempt} of at most {options.attempts}: {len(answer.domains)} domains, {len(answer.wrong)} malformed lines"
        )
        for line, reason in answer.wrong[:SHOWN]:
            print(f"  not used: {line[:100]!r} {reason}")
        if answer.domains and not answer.wrong:
            break
    best = max(reversed(answers), key=lambda answer: len(answer.domains))
    if not best.domains:
        raise ModelError(
            f"prompts.llm = '{model.name}' gave no valid domain in {len(answers)} answers (reasons above): "
            f"take another model, raise prompts.attempts, or {BY_HAND}"
        )
    if best.wrong:
        print(f"after {len(answers)} answers some lines are still malformed; {len(best.domains)} valid domains are kept")
    return best.domains, answers
