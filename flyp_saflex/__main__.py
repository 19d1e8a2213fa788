"""Entry point of `python -m flyp_saflex` and of `accelerate launch -m flyp_saflex`."""

from flyp_saflex.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
