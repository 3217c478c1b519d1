"""Talk to a trained model: `python eval_model.py --model_mode 1` (see `--help`)."""

from minimind.chat.cli import main
from minimind.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
