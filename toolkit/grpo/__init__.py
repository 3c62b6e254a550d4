"""Train models with GRPO on rewards that depend on response length. Built on TRL; needs the pip extra ``rl``.

A *recipe* holds the training settings of one method: reward, loss, batch size, learning rate (see ``recipes``).

Import the modules by name. ``import toolkit.grpo`` alone imports none of them, since importing TRL takes seconds.

The example trains ``tiny-reasoner``, a small model in this package. ``scaled`` adapts the recipe's numbers to that model::

    from pathlib import Path

    from toolkit import lm, tasks
    from toolkit.grpo import recipes
    from toolkit.grpo.run import Run, train

    model = lm.load("tiny-reasoner")
    done = train(model, recipes.grpo_lambda().scaled(), tasks.load("arithmetic", "train", 256), Run(Path("runs/lambda"), steps=60))
    done.lm, done.log  # a new model and the table of its training log; ``model`` is unchanged

Two commands for one GPU follow. The first trains every weight, with the numbers of the recipe's paper. The second trains a LoRA adapter,
with fewer problems per batch than in the paper. ``--reward`` is the name of a recipe, or of a reward for which there is no recipe.
``--set NAME=VALUE`` changes a number of the recipe, an option of its reward (``reward.NAME``), or a field of TRL's ``GRPOConfig``.
``--set problems=32`` sets the number of problems per batch. ``--problems`` sets the number of different training problems.
``--set updates=1`` sets the number of optimizer steps per batch. ``--micro-batch 4`` puts at most 4 responses in each forward pass::

    toolkit grpo --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --task gsm8k --reward dler --dtype bfloat16 --out runs/dler
    toolkit grpo --model Qwen/Qwen3-4B --task gsm8k --reward pear --train adapter --set problems=32 --set updates=1 --micro-batch 4 --out runs/pear

vLLM can generate the responses in the same process, through TRL. The reward then gets no entropies or log-probabilities, so rewards that
read them (those of the recipes PEAR and SAR) are refused. Two kinds of recipes are refused too: those with dynamic sampling (groups whose
rewards are all equal are replaced), and those with modes (prompts that request long or short thinking). A group is the set of rollouts of
one problem.

``vllm_mode=colocate`` is TRL's default. vLLM takes 30 % of the GPU's memory unless ``vllm_gpu_memory_utilization`` sets another share. It
keeps this memory during the training step unless ``vllm_enable_sleep_mode`` is true. TRL 1.16 accepts vLLM 0.22 to 0.31::

    toolkit grpo ... --training-engine trl --set use_vllm=true --set vllm_mode=colocate --set vllm_gpu_memory_utilization=0.3

To use several GPUs, start the command with accelerate, with or without DeepSpeed. A step uses the same batch as on one GPU, split over the
processes. So the recipe's number of responses per batch must be divisible by the number of processes. Each process holds all weights. ZeRO
stage 1 and 2 split the optimizer's state; stage 2 splits the gradients too. FSDP and ZeRO stage 3 split the weights. They are refused,
since the main process evaluates and saves the model alone. With vLLM in ``colocate`` mode, every process runs its own vLLM on its GPU::

    accelerate launch --multi_gpu --num_processes 8 $(which toolkit) grpo ...
    accelerate launch --num_processes 8 --use_deepspeed --zero_stage 2 --mixed_precision bf16 $(which toolkit) grpo ... --dtype bfloat16
    accelerate launch --multi_gpu --num_processes 8 $(which toolkit) grpo ... --training-engine trl --set use_vllm=true

Leave gradient accumulation and clipping out of accelerate's own config file. transformers sets both from the recipe's numbers, and refuses
a config file with other values. The options in these commands were checked against TRL 1.16 and accelerate 1.15; the commands were not run
on GPUs.

Trained weights are always fp32. With ``--dtype bfloat16``, computation runs under autocast to bfloat16; the module ``toolkit.grpo.run``
says how much memory this takes. The saved model is fp32 unless ``--save-dtype`` sets another dtype. A LoRA adapter is saved beside the
model, in the format of peft, which vLLM can load.

After a kill at any moment, the same command with ``--resume`` continues from the last complete checkpoint.

The tests compare a run on two processes (gloo, CPU) with a run on one. vLLM, DeepSpeed and GPUs are not tested; those commands rely on
TRL and accelerate.

Reading the log: the column ``loss`` says little. At the first optimizer step with a batch, it equals the negative mean advantage of the
batch's tokens. Look instead at ``grad_norm``, ``held_out/...`` and ``zero_std``. ``zero_std`` is the share of rollouts in groups whose
rewards are all equal; a group is the set of rollouts of one problem. Such groups add nothing to the gradient.
"""
