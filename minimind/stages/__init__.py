"""The training stages, one short file each."""

SCRIPTS = {  # stage, which is also the first part of its weight files' names -> what makes them
    "pretrain": "trainer/train_pretrain.py",
    "full_sft": "trainer/train_full_sft.py",
    "lora": "trainer/train_lora.py",
    "rlhf": "trainer/train_dpo.py",
    "reason": "trainer/train_distill_reason.py",
    "full_dist": "trainer/train_distillation.py",
}
