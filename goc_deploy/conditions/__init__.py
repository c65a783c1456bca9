"""What images show: `captions.Conditions`, `labels`, prompts (`text`), and files of tensors."""
