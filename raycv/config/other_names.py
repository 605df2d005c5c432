"""Names of Hugging Face's TrainingArguments, PEFT's LoraConfig and other tools, with the key of raycv for each."""

_KEYS = {
    "model.name": "model_name_or_path model_id base_model base_model_name_or_path pretrained_model_name_or_path",
    "model.revision": "model_revision",
    "model.target_modules": "lora_target_modules optim_target_modules",
    "dora.r": "lora_r lora_rank rank",
    "dora.alpha": "lora_alpha",
    "data.dir": "data_dir data_path dataset dataset_name dataset_path train_file",
    "prompt.max_length": "max_seq_length max_seq_len model_max_length block_size",
    "prompt.long_post": "truncation truncation_side",
    "cv.folds": "n_splits n_folds num_folds k_folds",
    "train.epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "train.patience": "early_stopping_patience",
    "train.batch_size": "per_device_train_batch_size per_gpu_train_batch_size train_batch_size micro_batch_size",
    "train.effective_batch_size": "gradient_accumulation_steps total_batch_size global_batch_size",
    "train.eval_batch_size": "per_device_eval_batch_size per_gpu_eval_batch_size",
    "train.packing": "group_by_length",
    "train.lr": "learning_rate lr_rate",
    "train.max_grad_norm": "gradient_clip_val clip_grad_norm",
    "train.warmup_steps": "warmup_ratio num_warmup_steps",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "train.imbalance": "class_weight class_weights pos_weight",
    "train.precision": "bf16 torch_dtype dtype mixed_precision",
    "train.seed": "random_seed random_state",
    "train.checkpoint_minutes": "save_steps save_strategy",
    "resources.gpus_per_fold": "num_gpus n_gpus n_gpu",
    "resources.workers_per_fold": "num_workers nproc_per_node num_processes",
    "resources.retries": "max_failures",
    "tracking.uri": "report_to mlflow_tracking_uri",
    "tracking.experiment": "experiment_name mlflow_experiment_name",
    "run.name": "run_name",
    "run.dir": "output_dir save_dir",
    "resume": "resume_from_checkpoint",
    "infer.device": "no_cuda use_cpu",
}
OTHER_NAMES = {name: key for key, names in _KEYS.items() for name in names.split()}
"""Another tool's name -> the key of raycv that does the same, or comes closest to it."""

_WITHOUT_KEY = """
    accelerator_config adafactor adam_beta1 adam_beta2 adam_epsilon alora_invocation_tokens alpha_pattern
    arrow_config attn_implementation auto_find_batch_size auto_mapping average_tokens_across_devices
    batch_eval_metrics bf16_full_eval bias bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant
    corda_config data_seed dataloader_drop_last dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
    ddp_find_unused_parameters ddp_timeout debug deepspeed device_map disable_tqdm do_eval do_predict do_train
    ensure_weight_tying eva_config eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start
    eval_steps eval_strategy eval_use_gather_object evaluation_strategy exclude_modules fan_in_fan_out fp16
    fp16_backend fp16_full_eval fp16_opt_level fsdp fsdp_config fsdp_min_num_params
    fsdp_transformer_layer_cls_to_wrap full_determinism gradient_checkpointing_kwargs greater_is_better
    half_precision_backend hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    ignore_data_skip include_for_metrics include_inputs_for_metrics include_num_input_tokens_seen
    include_tokens_per_second inference_mode init_lora_weights jit_mode_eval kasa_config label_names
    label_smoothing_factor layer_replication layers_pattern layers_to_transform length_column_name
    liger_kernel_config llm_int8_threshold load_best_model_at_end load_in_4bit load_in_8bit local_rank loftq_config
    log_level log_level_replica log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_steps
    logging_strategy lora_bias lora_ga_config lr_scheduler_kwargs max_steps megatron_config megatron_core
    metric_for_best_model modules_to_save monteclora_config mp_parameters neftune_noise_alpha num_labels optim
    optim_args overwrite_output_dir parallelism_config past_index peft_type peft_version prediction_loss_only
    project push_to_hub push_to_hub_model_id push_to_hub_organization push_to_hub_token qalora_group_size
    quantization_config rank_pattern ray_scope remove_unused_columns restore_callback_states_from_checkpoint
    runtime_config save_on_each_node save_only_model save_safetensors save_total_limit skip_memory_metrics
    target_parameters task_type tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    torchdynamo tpu_metrics_debug tpu_num_cores trackio_space_id trainable_token_indices trust_remote_code
    use_bdlora use_dora use_legacy_prediction_loop use_liger_kernel use_mps_device use_qalora use_rslora
    velora_config
"""
WITHOUT_KEY = frozenset(_WITHOUT_KEY.split())
"""Names of settings that raycv does not have."""
