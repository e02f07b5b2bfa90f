"""One runnable file a compared method, ablation or control; `diff` two of them, and see the method."""
