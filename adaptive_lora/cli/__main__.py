"""`python -m adaptive_lora.cli` is the command `adaptive-lora`."""

from adaptive_lora.cli.main import main

main()
