"""What every training script needs and no reader of the method does."""
