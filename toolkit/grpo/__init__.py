"""GRPO with length rewards, on TRL (extra ``rl``): recipes, training, the log. Nothing is imported here; importing TRL takes seconds.

::

    from toolkit import lm, tasks
    from toolkit.grpo import recipes
    from toolkit.grpo.run import Run, train

    model = lm.load("tiny-reasoner")
    done = train(model, recipes.grpo_lambda().scaled(), tasks.load("arithmetic", "train", 256), Run(Path("runs/lambda"), steps=60))
    done.lm, done.log  # a new model; the old one is as it was

On one GPU, every weight, the paper's numbers, or a LoRA adapter with fewer problems a step (``--set`` reaches a recipe's own numbers, the
reward's as ``reward.NAME``, and every field of TRL's ``GRPOConfig``)::

    toolkit grpo --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --task gsm8k --reward dler --dtype bfloat16 --out runs/dler
    toolkit grpo --model Qwen/Qwen3-4B --task gsm8k --reward pear --lora --set problems=32 --set updates=1 --micro-batch 4 --out runs/pear

With vLLM in the same process (TRL generates, the rewards are the same; no dynamic sampling, no modes, no entropies)::

    toolkit grpo ... --engine trl --set use_vllm=true --set vllm_mode=colocate

On many GPUs, with DeepSpeed, through accelerate; a step is the same batch, spread over the processes (each holds all weights: FSDP and
ZeRO stage 3 are refused)::

    accelerate launch --num_processes 8 $(which toolkit) grpo ...
    accelerate launch --num_processes 8 --use_deepspeed --zero_stage 2 $(which toolkit) grpo ...
    accelerate launch --num_processes 8 $(which toolkit) grpo ... --engine trl --set use_vllm=true

Weights that are trained are fp32, also with ``--dtype bfloat16``, which computes under autocast; ``run`` says what that costs in memory.
The saved model is fp32 unless ``--save-dtype`` says otherwise; a LoRA adapter is kept beside it, for peft and vLLM.

Killed at any moment, the same command with ``--resume`` goes on from the last whole checkpoint. Two processes with gloo on CPU are
tested against one, and vLLM, DeepSpeed and GPUs are not tested here: those lines are TRL's and accelerate's own.

What a number in the log means that often puzzles: the *loss* is near zero on-policy by construction (advantages of a group sum to
zero); look at ``grad_norm``, ``zero_std`` (groups that teach nothing) and the held-out columns instead.
"""
