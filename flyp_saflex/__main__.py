"""`python -m flyp_saflex`, which is also what `accelerate launch -m flyp_saflex` runs."""

from flyp_saflex.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
