"""Recovery: finetuning after surgery, distillation, LoRA."""
