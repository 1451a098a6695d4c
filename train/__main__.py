"""`python -m train CONFIG --out DIR`: what `peanut-jax train` does, from a checkout."""

import sys

from peanut_jax.trainer.command import main

if __name__ == "__main__":
    sys.exit(main())
