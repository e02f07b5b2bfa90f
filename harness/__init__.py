"""What every training script needs and no reader of the method does."""
import prepare      # noqa: F401  Ctrl-C, also while torch is loading, ends in one line
