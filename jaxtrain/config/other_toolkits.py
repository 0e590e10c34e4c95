"""The words of other toolkits, and what says the same here: Lightning, Hugging Face's Trainer and
Accelerate, torchrun, Keras, big_vision, MaxText, and the scripts that people write.

Only suggestions come from here; nothing is accepted that is not a flag. A suggestion is given where
every flag that it names exists in this experiment.
"""

import re
from collections.abc import Collection, Mapping

from jaxtrain import messages

Rows = tuple[tuple[str, str], ...]
"""Pairs of a pattern of the whole value that was typed, and what to write instead of the flag. In
it `{value}` is that value, `{percent}` the share as a percentage."""

_ON, _OFF = r"|true|1|yes|on", "false|0|no|off|none"
_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"
_SHARE = r"0?\.\d+"

RENAMED: Mapping[str, str] = {
    # numbers of the optimizer
    "lr": "learning_rate",
    "base_lr": "learning_rate",
    "max_lr": "learning_rate",
    "peak_lr": "learning_rate",
    "init_lr": "learning_rate",
    "initial_lr": "learning_rate",
    "step_size": "learning_rate",
    "eta": "learning_rate",
    "wd": "weight_decay",
    "l2": "weight_decay",
    "adam_weight_decay": "weight_decay",
    "beta1": "b1",
    "beta2": "b2",
    "beta_1": "b1",
    "beta_2": "b2",
    "adam_b1": "b1",
    "adam_b2": "b2",
    "adam_beta1": "b1",
    "adam_beta2": "b2",
    "epsilon": "eps",
    "adam_eps": "eps",
    "adam_epsilon": "eps",
    "layer_decay": "rates",
    "label_smoothing_factor": "label_smoothing",
    "smoothing": "label_smoothing",
    "drop_rate": "dropout",
    "dropout_rate": "dropout",
    "hidden_dropout_prob": "dropout",
    # sizes of models
    "hidden_size": "width",
    "hidden_dim": "width",
    "d_model": "width",
    "embed_dim": "width",
    "emb_dim": "width",
    "base_emb_dim": "width",
    "n_embd": "width",
    "num_layers": "depth",
    "n_layer": "depth",
    "n_layers": "depth",
    "num_hidden_layers": "depth",
    "base_num_decoder_layers": "depth",
    "num_heads": "heads",
    "n_head": "heads",
    "n_heads": "heads",
    "num_attention_heads": "heads",
    "patch_size": "patch",
    "vocab_size": "vocabulary",
    "num_labels": "num_classes",
    "n_classes": "num_classes",
    "nclass": "num_classes",
    "image_size": "size",
    "img_size": "size",
    # lengths
    "total_steps": "steps",
    "num_steps": "steps",
    "max_steps": "steps",
    "train_steps": "steps",
    "num_train_steps": "steps",
    "max_train_steps": "steps",
    "max_iters": "steps",
    "max_iter": "steps",
    "num_iters": "steps",
    "num_iterations": "steps",
    "iterations": "steps",
    "iters": "steps",
    "learning_rate_schedule_steps": "steps",
    "num_epochs": "epochs",
    "max_epochs": "epochs",
    "total_epochs": "epochs",
    "num_train_epochs": "epochs",
    "train_epochs": "epochs",
    "nb_epochs": "epochs",
    "n_epochs": "epochs",
    "num_tokens": "tokens",
    "train_tokens": "tokens",
    "total_tokens": "tokens",
    "max_tokens": "tokens",
    "max_duration_tokens": "tokens",
    "warmup": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "num_warmup_steps": "schedule.warmup",
    "lr_warmup_steps": "schedule.warmup",
    "warmup_iters": "schedule.warmup",
    # batches
    "bs": "batch_size",
    "b": "batch_size",
    "batch": "batch_size",
    "batchsize": "batch_size",
    "train_batch_size": "batch_size",
    "global_batch_size": "batch_size",
    "total_batch_size": "batch_size",
    "eval_bs": "eval_batch_size",
    "val_batch_size": "eval_batch_size",
    "test_batch_size": "eval_batch_size",
    "valid_batch_size": "eval_batch_size",
    "grad_accum": "microbatches",
    "grad_accum_steps": "microbatches",
    "accumulate_steps": "microbatches",
    "accum_steps": "microbatches",
    "accum_iter": "microbatches",
    "gradient_accumulation": "microbatches",
    "num_microbatches": "microbatches",
    "grad_clip": "clip_norm",
    "grad_clip_norm": "clip_norm",
    "clip_grad": "clip_norm",
    "clip_grad_norm": "clip_norm",
    "clipnorm": "clip_norm",
    "global_clipnorm": "clip_norm",
    "max_norm": "clip_norm",
    "gradient_clip": "clip_norm",
    "gradient_clipping": "clip_norm",
    "gradient_clipping_threshold": "clip_norm",
    "ema": "ema_decay",
    "model_ema_decay": "ema_decay",
    "ema_rate": "ema_decay",
    "random_seed": "seed",
    "rng_seed": "seed",
    "manual_seed": "seed",
    "seed_everything": "seed",
    "init_weights_seed": "seed",
    # parts
    "dataset": "data",
    "dataset_name": "data",
    "arch": "model",
    "a": "model",
    "model_name": "model",
    "network": "model",
    "opt": "optimizer",
    "optim": "optimizer",
    "opt_type": "optimizer",
    "optimizer_name": "optimizer",
    "optax_name": "optimizer",
    "scheduler": "schedule",
    "sched": "schedule",
    "lr_schedule": "schedule",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "decay_type": "schedule",
    "augmentation": "augment",
    "criterion": "task",
    "objective": "task",
    # data
    "data_path": "data.path",
    "train_file": "data.path",
    "dataset_path": "data.path",
    "data_dir": "data.path",
    "data_root": "data.path",
    "root": "data.path",
    # files
    "output_dir": "workdir",
    "out_dir": "workdir",
    "save_dir": "workdir",
    "save_path": "workdir",
    "work_dir": "workdir",
    "run_dir": "workdir",
    "default_root_dir": "workdir",
    "logdir": "workdir",
    "log_dir": "workdir",
    "logging_dir": "workdir",
    "model_dir": "workdir",
    "base_output_directory": "workdir",
    "exp_dir": "workdir",
    "experiment_dir": "workdir",
    "checkpoint_dir": "workdir",
    "ckpt_dir": "workdir",
    "model_init": "init_from",
    "load_parameters_path": "init_from",
    "init_from_checkpoint": "init_from",
    "pretrained_path": "init_from",
    "finetune": "init_from",
    "weights": "init_from",
    # cadences
    "log_interval": "log_every",
    "log_freq": "log_every",
    "log_steps": "log_every",
    "logging_steps": "log_every",
    "log_every_steps": "log_every",
    "log_every_n_steps": "log_every",
    "log_training_steps": "log_every",
    "log_period": "log_every",
    "print_freq": "log_every",
    "eval_steps": "eval_every",
    "eval_freq": "eval_every",
    "eval_interval": "eval_every",
    "eval_every_steps": "eval_every",
    "val_every": "eval_every",
    "validate_every": "eval_every",
    "save_steps": "checkpoint_every",
    "save_every": "checkpoint_every",
    "save_interval": "checkpoint_every",
    "save_freq": "checkpoint_every",
    "ckpt_steps": "checkpoint_every",
    "checkpoint_period": "checkpoint_every",
    "checkpoint_interval": "checkpoint_every",
    "checkpoint_steps": "checkpoint_every",
    "every_n_train_steps": "checkpoint_every",
    "keep_ckpt_steps": "keep_every",
    "save_total_limit": "keep",
    "save_top_k": "keep",
    "max_to_keep": "keep",
    "keep_checkpoint_max": "keep",
    "wandb_project": "wandb",
    "tb": "tensorboard",
    # processes
    "num_processes": "processes",
    "num_machines": "processes",
    "num_nodes": "processes",
    "nnodes": "processes",
    "world_size": "processes",
    "process_count": "processes",
    "process_id": "process",
    "process_index": "process",
    "machine_rank": "process",
    "node_rank": "process",
    "rank": "process",
    "rdzv_endpoint": "coordinator",
    "dist_url": "coordinator",
    "coordinator_address": "coordinator",
    # names of splits
    "train_split": "data.train",
    "val_split": "data.validation",
    "eval_split": "data.validation",
    "valid_split": "data.validation",
    "test_split": "data.test",
    # early stopping and the best, where this version has them
    "metric_for_best_model": "best",
    "monitor": "best",
}
"""Names that differ, for a value that means the same: name there -> name here, or its last part."""

_USE_ALL = "leave it out: all devices are used"
_DEVICES: Rows = (
    (r"[1-9]\d*", "write --mesh=data:{value}, or leave it out: all devices are used"),
    (r"\d+(?:,\d+)+,?", "leave it out, and set CUDA_VISIBLE_DEVICES={value} in the environment"),
    (r"cpu|gpu", "write --platform={value}"),
    (r"cuda(?::\d+)?", "write --platform=gpu"),
    (r".*", _USE_ALL),
)
_ONE_PROCESS: Rows = (
    (
        ".*",
        "leave it out: one process drives all GPUs of a host; scripts/launch_local starts several",
    ),
)
_NOT_NEEDED: Rows = ((".*", "leave it out: nothing here needs it"),)
_MIXED: Rows = (
    (_OFF + "|fp32|float32|32", "write --precision=fp32"),
    ("bf16|bfloat16|mixed_bfloat16", "write --precision=bf16"),
    ("fp16|float16|mixed_float16|half", "write --precision=fp16"),
    ("fp8", "write --precision=fp8"),
    (".*", "write --precision=auto, which takes what the card is good at"),
)
_FILE: Rows = (
    (
        r".*\.py",
        "leave it out: an experiment is started by its own file, python {value} [flags]",
    ),
    (".*", "write --flagfile=FILE, a file of flags, one a line"),
)
_WORKERS: Rows = ((".*", "leave it out: reading runs beside the training by itself"),)
_PER_DEVICE: Rows = (
    (".*", "did you mean --batch_size? it counts the examples of all devices together"),
)
_PARTS: Rows = (
    (
        ".*",
        "did you mean --microbatches? --batch_size is that of all parts together",
    ),
)
_RESUME: Rows = (
    (
        _ON + "|latest|last|auto|best",
        "leave it out: the same --workdir goes on from its newest checkpoint",
    ),
    (
        _OFF,
        "write --resume=never",
    ),
    (
        r"\d+",
        "leave it out: a run goes on from its newest checkpoint; for a warm start write"
        + " --init_from=WORKDIR/checkpoints/{value}",
    ),
    (".+", "write --workdir={value} to go on, or --init_from={value} to start from its parameters"),
)
_STRATEGY: Rows = (
    (r"fsdp.*|full_shard.*|zero.*|deepspeed.*", "write --mesh=fsdp:-1"),
    (r"tensor_parallel|tp", "write --mesh=tensor:-1"),
    (_OFF, "leave it out: without --mesh=... parameters are not sharded"),
    (r".*", "write --mesh=data:-1, which is the default"),
)
_VERBOSE: Rows = ((".*", "did you mean --log_every? it says after how many steps a line is shown"),)
_REPORT_TO: Rows = (
    ("wandb|all", "write --wandb=PROJECT"),
    (_OFF, "write --notensorboard"),
    (".*", "write --tensorboard"),
)
_TOKENIZER: Rows = (
    (".+", "write --data.tokenizer={value}"),
    (".*", "leave it out: this data needs no tokenizer; see docs/text.md"),
)
_TOKENS: Rows = (
    (r"\d+", "write --data.length={value}"),
    (".*", "leave it out: data says how long its sequences are"),
)

TRANSLATED: Mapping[str, Rows] = {
    # precision
    "fp16": ((_OFF, "write --precision=fp32"), (".*", "write --precision=fp16")),
    "half": ((_OFF, "write --precision=fp32"), (".*", "write --precision=fp16")),
    "bf16": ((_OFF, "write --precision=fp32"), (".*", "write --precision=bf16")),
    "bfloat16": ((_OFF, "write --precision=fp32"), (".*", "write --precision=bf16")),
    "fp8": ((_OFF, "write --precision=bf16"), (".*", "write --precision=fp8")),
    "fp32": ((_OFF, "write --precision=auto"), (".*", "write --precision=fp32")),
    "amp": _MIXED,
    "use_amp": _MIXED,
    "mixed_precision": _MIXED,
    "mixed_precision_policy": _MIXED,
    "precision_policy": _MIXED,
    "dtype": _MIXED,
    "compute_dtype": _MIXED,
    "half_precision": _MIXED,
    "tf32": (
        (_OFF, "write --matmul_precision=fp32"),
        (".*", "write --matmul_precision=tf32"),
    ),
    "allow_tf32": (
        (_OFF, "write --matmul_precision=fp32"),
        (".*", "write --matmul_precision=tf32"),
    ),
    # devices
    "gpu": _DEVICES,
    "gpus": _DEVICES,
    "gpu_ids": _DEVICES,
    "gpu_id": _DEVICES,
    "num_gpus": _DEVICES,
    "n_gpu": _DEVICES,
    "ngpu": _DEVICES,
    "device": _DEVICES,
    "devices": _DEVICES,
    "num_devices": _DEVICES,
    "cuda": ((_OFF, "write --platform=cpu"), (".*", "write --platform=gpu")),
    "use_cuda": ((_OFF, "write --platform=cpu"), (".*", "write --platform=gpu")),
    "use_gpu": ((_OFF, "write --platform=cpu"), (".*", "write --platform=gpu")),
    "cpu": ((_OFF, _USE_ALL), (".*", "write --platform=cpu")),
    "use_cpu": ((_OFF, _USE_ALL), (".*", "write --platform=cpu")),
    "accelerator": (
        ("cpu", "write --platform=cpu"),
        ("gpu|cuda", "write --platform=gpu"),
        (".*", "write --platform=auto"),
    ),
    "hardware": (
        ("cpu", "write --platform=cpu"),
        ("gpu|cuda", "write --platform=gpu"),
        (".*", "write --platform=auto"),
    ),
    "strategy": _STRATEGY,
    "distributed_type": _STRATEGY,
    "distribution": _STRATEGY,
    "sharding_strategy": _STRATEGY,
    "fsdp": ((r"[1-9]\d+", "write --mesh=fsdp:{value}"), (".*", "write --mesh=fsdp:-1")),
    "ddp": ((".*", "write --mesh=data:-1, which is the default"),),
    "deepspeed": ((".*", "write --mesh=fsdp:-1"),),
    "zero": ((".*", "write --mesh=fsdp:-1"),),
    "tp": ((r"[1-9]\d*", "write --mesh=data:-1,tensor:{value}"), (".*", "write --mesh=tensor:-1")),
    "sync_batchnorm": ((".*", "leave it out: batch norm always sees the whole batch"),),
    "sync_bn": ((".*", "leave it out: batch norm always sees the whole batch"),),
    "mesh_shape": ((".*", "did you mean --mesh? it names its axes, e.g. --mesh=data:2,fsdp:4"),),
    "nproc_per_node": _ONE_PROCESS,
    "nproc": _ONE_PROCESS,
    "local_rank": _ONE_PROCESS,
    "local_world_size": _ONE_PROCESS,
    "standalone": _ONE_PROCESS,
    "multi_gpu": _ONE_PROCESS,
    "rdzv_backend": (
        (".*", "leave it out: processes find one another by --coordinator=HOST:PORT"),
    ),
    "rdzv_id": ((".*", "leave it out: processes find one another by --coordinator=HOST:PORT"),),
    "master_addr": ((".+", "write --coordinator={value}:PORT"),),
    "main_process_ip": ((".+", "write --coordinator={value}:PORT"),),
    "master_port": ((".+", "write --coordinator=HOST:{value}"),),
    "main_process_port": ((".+", "write --coordinator=HOST:{value}"),),
    "dist_backend": ((".*", "leave it out: the devices choose how they talk"),),
    "max_restarts_per_node": ((".*", "did you mean --max_restarts?"),),
    # lengths and cadences
    "warmup_ratio": ((_SHARE + "|0|1", "write --schedule.warmup={percent}"),),
    "warmup_proportion": ((_SHARE + "|0|1", "write --schedule.warmup={percent}"),),
    "warmup_steps_fraction": ((_SHARE + "|0|1", "write --schedule.warmup={percent}"),),
    "warmup_fraction": ((_SHARE + "|0|1", "write --schedule.warmup={percent}"),),
    "warmup_epochs": ((_NUMBER, "write --schedule.warmup={value}epochs"),),
    "steps_per_epoch": (
        (
            ".*",
            "leave it out: an epoch is one pass over the data; --steps says how long the run is",
        ),
    ),
    "initial_epoch": _RESUME,
    "start_epoch": _RESUME,
    "min_epochs": ((".*", "leave it out: --epochs says how long the run is"),),
    "max_time": (
        (
            ".*",
            "leave it out: SIGTERM saves and ends with status 75; the same command goes on later",
        ),
    ),
    "evaluation_strategy": (
        ("epoch", "write --eval_every=1epochs"),
        (_OFF, "write --eval_every=0"),
        (".*", "write --eval_every=200, or another number of steps, epochs or %"),
    ),
    "eval_strategy": (
        ("epoch", "write --eval_every=1epochs"),
        (_OFF, "write --eval_every=0"),
        (".*", "write --eval_every=200, or another number of steps, epochs or %"),
    ),
    "save_strategy": (
        ("epoch", "write --checkpoint_every=1epochs"),
        (_OFF, "write --checkpoint_every=0"),
        (
            ".*",
            "write --checkpoint_every=200, or another number of steps, epochs or %",
        ),
    ),
    "logging_strategy": _VERBOSE,
    "eval_every_epochs": ((_NUMBER, "write --eval_every={value}epochs"),),
    "check_val_every_n_epoch": ((_NUMBER, "write --eval_every={value}epochs"),),
    "val_check_interval": (
        (_SHARE, "write --eval_every={value}epochs"),
        (r"1\.0", "write --eval_every=1epochs"),
        (r"\d+", "write --eval_every={value}"),
    ),
    "validation_freq": ((_NUMBER, "write --eval_every={value}epochs"),),
    "save_every_epochs": ((_NUMBER, "write --checkpoint_every={value}epochs"),),
    "every_n_epochs": ((_NUMBER, "write --checkpoint_every={value}epochs"),),
    "limit_train_batches": (
        (_SHARE, "write --data.train=train[:{percent}]"),
        (r"\d+", "write --steps={value}"),
    ),
    "overfit_batches": ((_SHARE, "write --data.train=train[:{percent}]"),),
    "max_train_samples": ((r"\d+", "write --data.train=train[:{value}]"),),
    "limit_val_batches": (
        (_SHARE, "write --data.validation=test[:{percent}]"),
        ("0", "write --eval_every=0"),
    ),
    "limit_test_batches": ((_SHARE, "write --data.test=test[:{percent}]"),),
    "validation_split": (
        (
            _SHARE,
            "write --data.train=train[:{rest}] --data.validation=train[{rest}:]",
        ),
    ),
    "validation_steps": ((".*", "leave it out: every evaluation reads the whole split"),),
    "max_eval_samples": ((r"\d+", "write --data.validation=test[:{value}]"),),
    "fast_dev_run": ((".*", "write --steps=2"),),
    "dry_run": ((".*", "write --steps=2"),),
    "num_sanity_val_steps": _NOT_NEEDED,
    # batches
    "per_device_train_batch_size": _PER_DEVICE,
    "per_device_batch_size": _PER_DEVICE,
    "per_gpu_train_batch_size": _PER_DEVICE,
    "per_gpu_batch_size": _PER_DEVICE,
    "batch_size_per_device": _PER_DEVICE,
    "micro_batch_size": _PER_DEVICE,
    "per_device_eval_batch_size": (
        (".*", "did you mean --eval_batch_size? it counts the examples of all devices together"),
    ),
    "eval_per_device_batch_size": (
        (".*", "did you mean --eval_batch_size? it counts the examples of all devices together"),
    ),
    "gradient_accumulation_steps": _PARTS,
    "accumulate_grad_batches": _PARTS,
    "gradient_clip_val": (
        ("0|0.0", "write --clip_norm=none"),
        (".*", "did you mean --clip_norm?"),
    ),
    "max_grad_norm": (
        ("0|0.0", "write --clip_norm=none"),
        (".*", "did you mean --clip_norm?"),
    ),
    "gradient_clip_algorithm": (
        ("norm", "leave it out: --clip_norm clips the norm"),
        (".*", "write --clip_norm=1, or another norm: only the norm of all gradients is clipped"),
    ),
    "clipvalue": (
        (".*", "write --clip_norm=1, or another norm: only the norm of all gradients is clipped"),
    ),
    "auto_lr_find": _NOT_NEEDED,
    "auto_scale_batch_size": _NOT_NEEDED,
    "optim_bits": ((".*", "write --optimizer_state=bf16"),),
    # going on
    "ckpt_path": _RESUME,
    "checkpoint_path": _RESUME,
    "ckpt": _RESUME,
    "load": _RESUME,
    "load_checkpoint": _RESUME,
    "load_from": _RESUME,
    "load_full_state_path": _RESUME,
    "restore": _RESUME,
    "restore_step": _RESUME,
    "restore_from": _RESUME,
    "resume": _RESUME,
    "resume_from": _RESUME,
    "resume_path": _RESUME,
    "resume_step": _RESUME,
    "resume_from_checkpoint": _RESUME,
    "continue_from": _RESUME,
    "model_name_or_path": (
        (r".*[/.].*", "write --init_from={value}"),
        (".+", "write --model={value}"),
    ),
    "pretrained_model_name_or_path": ((r".*[/.].*", "write --init_from={value}"),),
    "pretrained": (
        (_ON, "write --init_from=WORKDIR, a run or checkpoint of jaxtrain"),
        (_OFF, "leave it out: parameters are new unless --init_from=WORKDIR says otherwise"),
        (".*", "write --init_from={value}"),
    ),
    "overwrite_output_dir": ((".*", "leave it out: nothing is overwritten; give a new --workdir"),),
    "overwrite": ((".*", "leave it out: nothing is overwritten; give a new --workdir"),),
    "exist_ok": ((".*", "leave it out: nothing is overwritten; give a new --workdir"),),
    "run_name": ((".+", "write --workdir=runs/{value}"), (".*", "did you mean --workdir?")),
    "exp_name": ((".+", "write --workdir=runs/{value}"), (".*", "did you mean --workdir?")),
    "experiment_name": ((".+", "write --workdir=runs/{value}"), (".*", "did you mean --workdir?")),
    "name": ((".+", "write --workdir=runs/{value}"), (".*", "did you mean --workdir?")),
    "project": ((".+", "write --wandb={value}"), (".*", "did you mean --wandb?")),
    "project_name": ((".+", "write --wandb={value}"), (".*", "did you mean --wandb?")),
    "save_model": ((".*", "leave it out: the last step is always committed"),),
    "enable_checkpointing": (
        (_OFF, "write --checkpoint_every=0, which commits the last step only"),
        (".*", "leave it out: checkpoints are always written; --checkpoint_every says how often"),
    ),
    "async_checkpointing": _NOT_NEEDED,
    "load_best_model_at_end": ((".*", "leave it out: the best checkpoint is always kept"),),
    "save_best_only": ((".*", "leave it out: the best checkpoint is always kept"),),
    "greater_is_better": ((".*", "did you mean --best? e.g. --best=accuracy,max"),),
    "early_stopping": ((".*", "write --stop_after=5evals"),),
    "early_stop": ((".*", "write --stop_after=5evals"),),
    "early_stopping_patience": ((r"\d+", "write --stop_after={value}evals"),),
    "patience": ((r"\d+", "write --stop_after={value}evals"),),
    # configuration
    "config": _FILE,
    "cfg": _FILE,
    "config_file": _FILE,
    "config_path": _FILE,
    "config_name": _FILE,
    "conf": _FILE,
    "c": _FILE,
    "experiment": _FILE,
    "multirun": ((".*", "leave it out: one command is one run; start one for each value"),),
    "m": ((".*", "leave it out: one command is one run; start one for each value"),),
    "sweep": ((".*", "leave it out: one command is one run; start one for each value"),),
    # what runs
    "do_train": (
        (_OFF, "write --eval_only"),
        (".*", "leave it out: an experiment trains by itself"),
    ),
    "train": ((_OFF, "write --eval_only"), (".*", "leave it out: an experiment trains by itself")),
    "do_eval": (
        (_OFF, "write --eval_every=0"),
        (".*", "leave it out: --eval_every says how often, --eval_only that nothing is trained"),
    ),
    "do_predict": ((".*", "write --eval_only"),),
    "eval": ((".*", "write --eval_only"),),
    "e": ((".*", "did you mean --epochs, or --eval_only?"),),
    "evaluate": ((".*", "write --eval_only"),),
    "test": ((".*", "write --eval_only"),),
    "test_only": ((".*", "write --eval_only"),),
    "validate": ((".*", "write --eval_only"),),
    "mode": (
        ("train|fit", "leave it out: an experiment trains by itself"),
        ("eval|evaluate|test|val|validate", "write --eval_only"),
    ),
    # memory
    "gradient_checkpointing": (
        (_OFF, "write --remat=none"),
        (".*", "write --remat=blocks"),
    ),
    "activation_checkpointing": (
        (_OFF, "write --remat=none"),
        (".*", "write --remat=blocks"),
    ),
    "grad_checkpointing": ((_OFF, "write --remat=none"), (".*", "write --remat=blocks")),
    "remat_policy": (
        ("none|off|false", "write --remat=none"),
        ("minimal.*|.*dots.*|save_qkv_proj|save_dot.*", "write --remat=dots"),
        (".*", "write --remat=blocks"),
    ),
    "optimizer_memory_host_offload": (
        (_OFF, "write --offload=none"),
        (".*", "write --offload=optimizer"),
    ),
    "cpu_offload": ((_OFF, "write --offload=none"), (".*", "write --offload=optimizer")),
    # reproducing and finding faults
    "deterministic": (
        (_OFF, "write --noreproducible"),
        (
            ".*",
            "leave it out: runs on the same devices are; for the same bits on any write"
            + " --reproducible",
        ),
    ),
    "full_determinism": (
        (".*", "write --reproducible, or leave it out: runs on the same devices are"),
    ),
    "benchmark": _NOT_NEEDED,
    "cudnn_benchmark": _NOT_NEEDED,
    "detect_anomaly": ((_OFF, "write --nodebug_nans"), (".*", "write --debug_nans")),
    "debug": ((_OFF, "leave it out"), (".*", "write --debug_nans, or --traceback for errors")),
    "profiler": (
        (_OFF, "write --profile_steps=none"),
        (".*", "write --profile_steps=20,25, its first and last step"),
    ),
    "profile": (
        (_OFF, "write --profile_steps=none"),
        (".*", "write --profile_steps=20,25, its first and last step"),
    ),
    "skip_first_n_steps_for_profiler": (
        (".*", "write --profile_steps=20,25, its first and last step"),
    ),
    "compile": ((".*", "leave it out: the whole step is always compiled"),),
    "torch_compile": ((".*", "leave it out: the whole step is always compiled"),),
    "jit": ((".*", "leave it out: the whole step is always compiled"),),
    "jit_compile": ((".*", "leave it out: the whole step is always compiled"),),
    "run_eagerly": ((_OFF, "leave it out: the whole step is always compiled"),),
    # reading
    "num_workers": _WORKERS,
    "workers": _WORKERS,
    "j": _WORKERS,
    "dataloader_num_workers": _WORKERS,
    "grain_worker_count": _WORKERS,
    "num_proc": _WORKERS,
    "preprocessing_num_workers": _WORKERS,
    "persistent_workers": _WORKERS,
    "prefetch": _WORKERS,
    "prefetch_factor": _WORKERS,
    "pin_memory": _WORKERS,
    "dataloader_pin_memory": _WORKERS,
    "shuffle": ((".*", "leave it out: every epoch of training has its own order, by --seed"),),
    "shuffle_buffer_size": (
        (".*", "leave it out: every epoch of training has its own order, by --seed"),
    ),
    "drop_last": ((".*", "leave it out: batches run on over the ends of epochs, nothing is lost"),),
    "dataloader_drop_last": (
        (".*", "leave it out: batches run on over the ends of epochs, nothing is lost"),
    ),
    "data_seed": ((".*", "did you mean --seed? every random stream comes from it"),),
    "cache_dir": ((".*", "leave it out, and set JAX_COMPILATION_CACHE_DIR for compiled programs"),),
    "compilation_cache_dir": (
        (".*", "leave it out, and set JAX_COMPILATION_CACHE_DIR for compiled programs"),
    ),
    "jax_cache_dir": (
        (".*", "leave it out, and set JAX_COMPILATION_CACHE_DIR for compiled programs"),
    ),
    # what is shown
    "verbose": _VERBOSE,
    "v": _VERBOSE,
    "verbosity": _VERBOSE,
    "quiet": _VERBOSE,
    "log_level": _VERBOSE,
    "enable_progress_bar": _VERBOSE,
    "disable_tqdm": _VERBOSE,
    "progress": _VERBOSE,
    "report_to": _REPORT_TO,
    "logger": _REPORT_TO,
    "log_with": _REPORT_TO,
    "enable_tensorboard": ((_OFF, "write --notensorboard"), (".*", "write --tensorboard")),
    "use_wandb": ((_OFF, "write --wandb="), (".*", "write --wandb=PROJECT")),
    "callbacks": ((".*", "leave it out: callables are given in the experiment's file"),),
    # MaxText's axes
    "ici_data_parallelism": ((r"-?\d+", "write --mesh=data:{value}"),),
    "dcn_data_parallelism": ((r"-?\d+", "write --mesh=data:{value}"),),
    "ici_fsdp_parallelism": ((r"-?\d+", "write --mesh=fsdp:{value}"),),
    "dcn_fsdp_parallelism": ((r"-?\d+", "write --mesh=fsdp:{value}"),),
    "ici_tensor_parallelism": ((r"-?\d+", "write --mesh=tensor:{value}"),),
    "dcn_tensor_parallelism": ((r"-?\d+", "write --mesh=tensor:{value}"),),
    "tensor_parallel_size": ((r"-?\d+", "write --mesh=data:-1,tensor:{value}"),),
    "tensor_model_parallel_size": ((r"-?\d+", "write --mesh=data:-1,tensor:{value}"),),
    "dataset_type": ((".+", "write --data={value}"),),
    "tokenizer": _TOKENIZER,
    "tokenizer_path": _TOKENIZER,
    "tokenizer_name": _TOKENIZER,
    "max_length": _TOKENS,
    "max_seq_length": _TOKENS,
    "max_target_length": _TOKENS,
    "seq_length": _TOKENS,
    "seq_len": _TOKENS,
    "block_size": _TOKENS,
    "context_length": _TOKENS,
    "lora_r": ((r"\d+", "write --lora.rank={value}"),),
    "lora_rank": ((r"\d+", "write --lora.rank={value}"),),
    "lora_alpha": ((r"\d+", "write --lora.alpha={value}"),),
    # Hugging Face's names of optimizers
    "optimizer_type": ((".+", "write --optimizer={value}"),),
    "opt_name": ((".+", "write --optimizer={value}"),),
    "pp_train": ((".*", "did you mean --augment? preprocessing is the data source's"),),
    "push_to_hub": ((".*", "leave it out: nothing is uploaded"),),
    "hub_model_id": ((".*", "leave it out: nothing is uploaded"),),
    "hub_token": ((".*", "leave it out: nothing is uploaded"),),
    "cleanup": ((".*", "leave it out: a finished run keeps the newest checkpoints, by --keep"),),
}
"""What means something else here, or nothing, by its value: name there -> what to write."""

SAME_VALUES = (
    ("fp16", "float16", "f16", "half", "16", "16-mixed", "16-true", "fp16-mixed", "mixed_float16"),
    ("bf16", "bfloat16", "bf16-mixed", "bf16-true", "mixed_bfloat16"),
    ("fp32", "float32", "f32", "32", "32-true", "single", "full", "float", "highest"),
    ("fp32", "fp64", "float64", "64", "64-true", "double"),
    ("fp8", "float8", "f8", "transformer-engine", "e4m3"),
    ("tf32", "tensorfloat32", "high"),
    ("auto", "default", "automatic", "tpu", "mps", "best", "all", "any"),
    ("gpu", "cuda", "cuda:0", "nvidia", "rocm", "gpus"),
    ("blocks", "full", "block", "everything", "nothing_saveable"),
    ("dots", "minimal", "checkpoint_dots", "dots_saveable"),
    ("must", "force", "required"),
    ("auto", "latest", "last", "allow"),
    ("never", "off", "no", "false", "none", "0"),
    ("none", "off", "no", "false", "0", "never", "null"),
    ("no", "off", "false", "0", "never", "none"),
    ("yes", "on", "true", "1", "always"),
    ("default", "auto", "none", "no", "off"),
    ("fp32", "no", "none", "off", "false"),
    ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adam_pax", "fused_adamw"),
    ("adafactor", "big_vision.scale_by_adafactor", "scale_by_adafactor"),
    ("adam", "scale_by_adam", "torch.optim.adam"),
    ("cosine", "cosine_with_warmup", "cosineannealinglr", "cosine_annealing", "cos"),
    ("linear", "linear_with_warmup", "polynomial", "linear_decay"),
    ("constant", "constant_with_warmup", "fixed"),
    ("step", "multistep", "multisteplr", "steplr", "piecewise"),
    ("rsqrt", "inverse_sqrt", "noam"),
    ("warmup_stable_decay", "wsd", "trapezoidal"),
)
"""Words for one choice; the first is ours."""

_LIGHT_WORDS = re.compile(
    r"^(?:trainer|training|train|config|cfg|args|hparams|hyperparameters|opts)\."
)
_FLAGS_IN = re.compile(r"--(?:no)?([a-z][\w.]*)")


def same_value(word: str, choices: Collection[str]) -> str | None:
    """The one of our choices that another toolkit calls `word`.

    >>> same_value("16-mixed", ["auto", "fp32", "fp16"]), same_value("xyzzy", ["fp32"])
    ('fp16', None)
    """
    said = word.lower()
    found = (ours for ours, *others in SAME_VALUES if said in others and ours in choices)
    return next(found, None)


def plain(name: str) -> str:
    """A name as the tables have it: small letters, underscores, without what only says where it
    stands.

    >>> plain("trainer.Max-Epochs")
    'max_epochs'
    """
    return _LIGHT_WORDS.sub("", name.lower().replace("-", "_"))


def is_known(name: str) -> bool:
    """Whether a name is a word of another toolkit.

    >>> is_known("early_stopping_patience"), is_known("xyzzy")
    (True, False)
    """
    return plain(name) in TRANSLATED


def instead(name: str, value: str | None, known: Collection[str]) -> str | None:
    """What to write instead of a flag of another toolkit, in words, if every flag in them is one
    of the `known`.

    >>> instead("gpus", "4", ["mesh"])
    'write --mesh=data:4, or leave it out: all devices are used'
    >>> instead("warmup_ratio", "0.1", ["schedule.warmup"])
    'write --schedule.warmup=10%'
    """
    word, typed = plain(name), "" if value is None else value
    if word not in TRANSLATED and word.startswith("no"):  # --nofp16, --no-cuda
        word, typed = word.removeprefix("no").removeprefix("_"), "false"
    for pattern, text in TRANSLATED.get(word, ()):
        if not re.fullmatch(pattern, typed, re.IGNORECASE | re.DOTALL):
            continue
        share = float(typed) if re.fullmatch(_NUMBER + "|" + _SHARE, typed) else 0.0
        if not all(_known(flag, known) for flag in _FLAGS_IN.findall(text)):
            continue
        filled = text.replace("{percent}", f"{share * 100:g}%")
        filled = filled.replace("{rest}", f"{100 - share * 100:g}%")
        return filled.replace("{value}", messages.printable(typed))
    return None


def _known(flag: str, known: Collection[str]) -> bool:
    """`flagfile` is absl's own."""
    return flag == "flagfile" or flag.rstrip(".") in known
