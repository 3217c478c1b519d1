"""Talk to a trained model: `python eval_model.py --model_mode 1` (see `--help`)."""

from minimind.errors import run_cli

MAIN = "minimind.chat.cli:main"

if __name__ == "__main__":
    run_cli(MAIN)
