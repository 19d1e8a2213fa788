"""Take the edits that ALIA released (arXiv 2305.16289) into the augment cache, so that a recipe can train on them.

    python scripts/import_alia.py FOLDER cub --set data.root=PATH
    python scripts/import_alia.py FOLDER iwildcam-mini --set data.root=PATH --key alia

FOLDER holds <prompt>/strength-<x>_guidance-<y>/<class>/<row>-<k>.png; row counts the images of ALIA's training list.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flyp_saflex import load_dataset, load_recipe
from flyp_saflex.editing.import_alia import import_alia
from flyp_saflex.errors import ConfigError, UserError


def main() -> int:
    """Read the arguments, import, and say where the entry is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="ALIA's folder")
    parser.add_argument("recipe", help="recipe of the dataset: cub, iwildcam-mini, or a .toml file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="set an option; repeatable")
    parser.add_argument("--key", default="alia", help="name of the cache entry (default: alia)")
    arguments = parser.parse_args()
    try:
        config = load_recipe(arguments.recipe, arguments.set)
        if config.data.shots or config.data.add_to_train:
            raise ConfigError(
                "data.shots and data.add_to_train change the training list that ALIA's rows count: import with "
                "--set data.shots=0 --set data.add_to_train=[], then train with them"
            )
        cache = import_alia(arguments.folder, load_dataset(config.data, seed=config.seed), config.cache.root, key=arguments.key)
    except UserError as error:
        print(f"import_alia: {error}", file=sys.stderr)
        return 2
    print(f'{len(cache)} edits in {cache.folder}; train with cache.key={arguments.key} and augment.upstream=["cache"]')
    return 0


if __name__ == "__main__":
    sys.exit(main())
