"""Does the test suite notice? Each mutant breaks one place of the code, and the tests named beside it must then fail.

    pytest -m slow -n 0 tests/mutants.py

A mutant names no file: its snippet must stand in the top-level files exactly once, in whichever.
"""

import concurrent.futures
import contextlib
import io
import multiprocessing
import os
import pathlib
import shutil

import pytest
import torch

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
SLOW_IMPORTS = ["foolbox", "matplotlib.figure", "pytest", "scipy.stats", "sklearn.datasets", "torch", "torchvision"]
RECORDED = "test_runtime.py::test_recorded_training_is_the_eager_one[madry]"
LOOP = "test_loop.py::test_train_equals_the_independent_loop[mart]"

MUTANTS = {  # name: (snippet, replacement, *the tests that must fail)
    # recording
    "a recording keeps its first inputs": (
        "kept.copy_(given)", "pass", RECORDED),
    "a recording hands out what it overwrites": (
        "return self.outputs.clone()", "return self.outputs",
        "test_runtime.py::test_what_a_recording_returned_stays"),
    "a recording serves every alpha": (
        "*((key, _value(v)) for key, v in part.keywords.items())", "*((key, 0) for key in part.keywords)",
        "test_runtime.py::test_a_recording_is_found_again_by_what_it_does"),
    "a recording of any shape": (
        "if inputs[0].shape != self.shape:", "if False:",
        "test_runtime.py::test_a_recording_is_found_again_by_what_it_does"),
    "a recording is not compared": (
        "if not any(differ(a, b) for", "if True or any(differ(a, b) for",
        "test_runtime.py::test_a_recording_that_is_not_the_function_is_not_used[other values-False]"),
    "a recorded attack's pixels are compared, not how far they moved": (
        "out - inputs[0] if out.shape == self.shape else out for", "out for",
        "test_runtime.py::test_an_attack_that_does_not_attack_is_not_used"),
    "a recording does not hand out its gradients": (
        "parameter.grad = gradient\n", "pass\n", "test_runtime.py::test_each_recording_leaves_its_own_gradients"),
    "a rehearsal moves the running statistics": (
        "model.load_state_dict(before, strict=False)", "pass", "test_runtime.py::test_a_rehearsal_leaves_no_trace"),
    "a compiler that was asked for and fails is passed over": (
        'if strict and asked != "auto":', "if False:",
        "test_runtime.py::test_a_compiler_that_was_asked_for_and_fails_ends_the_run_in_one_line"),
    # training
    "the rate is never set": (
        'run.group["lr"] = learning_rate(', "_ = learning_rate(", LOOP),
    "the schedule is one epoch behind": (
        "learning_rate(args, epoch + 1, ", "learning_rate(args, epoch, ", LOOP),
    "--nesterov is ignored": (
        "nesterov=args.nesterov", "nesterov=False", "test_flags.py::test_train[--nesterov]"),
    "every epoch has the same order": (
        "args.batch_size, args.seed, epoch, ", "args.batch_size, args.seed, 0, ", LOOP),
    "the adversarial pass comes first": (
        'logits_nat = None if args.defense == "madry" else forward(x)\n'
        '    logits_adv = None if args.defense == "standard" else forward(x_adv)\n',
        'logits_adv = None if args.defense == "standard" else forward(x_adv)\n'
        '    logits_nat = None if args.defense == "madry" else forward(x)\n', LOOP),
    "the training attack starts at the image": (
        "num_steps=args.num_steps, random_start=start)", 'num_steps=args.num_steps, random_start="none")',
        "test_flags.py::test_train[--random-start]"),
    "validation takes steps of epsilon / 4": (
        "eval_attacks.pgd_params(args.epsilon))",
        "eval_attacks.pgd_params(args.epsilon, step_size=str(Fraction(args.epsilon) / 4)))",
        LOOP),
    "digits are mirrored": (
        "data.augment(images, rng, train_set.mirror)", "data.augment(images, rng)", LOOP),
    "--momentum is ignored": (
        "args.lr, args.momentum, ", "args.lr, 0.9, ", "test_flags.py::test_train[--momentum]"),
    "--weight-decay is ignored": (
        "weight_decay=args.weight_decay", "weight_decay=5e-4", "test_flags.py::test_train[--weight-decay]"),
    "--beta is ignored": (
        "logits_nat, y, args.beta)", "logits_nat, y, 5.0)", "test_flags.py::test_train[--beta]"),
    "the update runs in eval mode": (
        "    model.train()\n    model.zero_grad()",
        "    model.eval()\n    model.zero_grad()",
        LOOP),
    "the training attack runs in train mode": (
        "with models.frozen(model):\n        target = y",
        "with contextlib.nullcontext():\n        target = y",
        LOOP),
    "gradients add up": (
        "    model.train()\n    model.zero_grad()", "    model.train()",
        LOOP),
    "clean and attacked logits change places": (
        "OUTER[args.defense](logits_adv, logits_nat,",
        "OUTER[args.defense](logits_nat, logits_adv,",
        LOOP),
    "alpha 0 counts as no alpha": (
        "if args.spat_alpha is not None:\n        objective", "if args.spat_alpha:\n        objective",
        "test_flags.py::test_train[--spat-alpha]"),
    "TRADES' target is of the uncompiled model": (
        "target = attacks.probabilities(forward, x)\n        settings",
        "target = attacks.probabilities(model, x)\n        settings",
        "test_train.py::test_trades_target_is_of_the_callable_that_is_attacked"),
    "what stops early moves one step more": (
        "moves = (~wrong | (left > 0))", "moves = (~wrong | (left >= 0))",
        "test_attacks.py::test_early_stopped_pgd_equals_a_loop_over_single_images[0]"),
    "what is wrong at first never stops": (
        "left - wrong.long()", "left", "test_attacks.py::test_early_stopped_pgd_equals_a_loop_over_single_images[1]"),
    "every step draws alike": (
        "train_set.images.device, args.seed, step)", "train_set.images.device, args.seed, 0)", LOOP),
    "of equal epochs the first is best": (
        "score >= self.best", "score > self.best",
        "test_train.py::test_the_best_epoch[madry-natural2-robust2-2]"),
    "the best epoch is the one best on clean images": (
        'row["val_natural_accuracy" if self.args.defense == "standard" else',
        'row["val_natural_accuracy" if True else',
        "test_train.py::test_the_best_epoch[madry-natural0-robust0-2]"),
    "the epoch's sums go on": (
        "self.sums.zero_()", "pass", LOOP),
    "validation runs in train mode": (
        "with models.frozen(model):\n        for name, attack in", "if True:\n        for name, attack in",
        LOOP),
    "the log's accuracies change places": (
        "for logits in (logits_nat, logits_adv)]", "for logits in (logits_adv, logits_nat)]",
        "test_train.py::test_the_tally_counts_per_example"),
    "the logged loss is the last epoch's mean over images": (
        '"train_loss": sums.loss / steps',
        '"train_loss": sums.loss / (steps * args.batch_size)',
        LOOP),
    "the share of every step is logged": (
        "% run.steps_per_epoch % SHARES_EVERY", "% run.steps_per_epoch % 1",
        "test_train.py::test_the_tally_counts_per_example"),
    "the rate falls an epoch late": (
        "0.1 if epoch >= first", "0.1 if epoch > first", "test_train.py::test_step_schedule_at_its_boundaries"),
    "the cosine starts one epoch in": (
        "math.cos((epoch - 1) * math.pi", "math.cos(epoch * math.pi", "test_train.py::test_cosine_schedule_is_torchs"),
    "one cycle never falls to zero": (
        "math.cos((progress - 0.3) / 0.7 * math.pi)", "math.cos((progress - 0.3) * math.pi)",
        "test_train.py::test_onecycle_rises_to_the_peak_and_falls_to_zero"),
    "momentum is lost on resume": (
        'self.optimizer.load_state_dict(checkpoint["optimizer"])',
        "pass",
        "test_train.py::test_a_stopped_run_goes_on_to_the_same_end[4-flags2]"),
    "the sums of the epoch are lost on resume": (
        'self.sums = checkpoint["sums"].to(self.device)',
        "pass",
        "test_train.py::test_a_stopped_run_goes_on_to_the_same_end[4-flags2]"),
    "a resumed run begins its epoch anew": (
        "steps[run.step - epoch * run.steps_per_epoch :]", "steps",
        "test_train.py::test_a_stopped_run_goes_on_to_the_same_end[4-flags2]"),
    "the best score is lost on resume": (
        'self.rows, self.best = checkpoint["rows"], checkpoint["best"]',
        'self.rows = checkpoint["rows"]',
        "test_train.py::test_a_resumed_run_remembers_its_best"),
    "--save-minutes counts seconds": (
        "> 60 * self.args.save_minutes", "> self.args.save_minutes",
        "test_train.py::test_it_saves_every_so_many_minutes"),
    # the evaluation
    "the worst case takes any attack that leaves an image right": (
        "np.logical_and.reduce(", "np.logical_or.reduce(",
        "test_eval.py::test_accuracies_equal_a_loop_written_out"),
    "the evaluation takes training images": (
        "data.load(dataset, args.data_dir, train=False)", "data.load(dataset, args.data_dir)",
        "test_eval.py::test_accuracies_equal_a_loop_written_out"),
    "the last batch is counted in full": (
        "progress(len(counted))", "progress(batch_size)",
        "test_eval.py::test_attacked_logits_do_not_depend_on_the_batch_size[4]"),
    "an image's start is that of its place in the batch": (
        "attack(x, labels[indices], on_cpu)", "attack(x, labels[indices], torch.arange(len(x)))",
        "test_eval.py::test_attacked_logits_do_not_depend_on_the_batch_size[4]"),
    "every restart draws the same start": (
        "functools.partial(attack, restart=restart)", "attack",
        "test_eval.py::test_restarts_break_what_any_of_them_breaks"),
    "the last restart alone counts": (
        'passes=1 + params["num_steps"])\n                chosen = chosen & self.right()',
        'passes=1 + params["num_steps"])', "test_eval.py::test_restarts_break_what_any_of_them_breaks"),
    "the start ignores the restart": (
        "(seed * 1000 + restart) * 10_000_000", "(seed * 1000) * 10_000_000",
        "test_attacks.py::test_start_per_image_depends_on_seed_restart_and_index_only"),
    "the seed does not reach the attack": (
        'params.get("seed", 0), restart)', "0, restart)", "test_flags.py::test_evaluation[--seed]"),
    "kappa does not reach the attack": (
        'kappa=params.get("kappa", 50.0)', "kappa=50.0", "test_flags.py::test_evaluation[--kappas]"),
    "alpha does not reach the attack": (
        'alpha=params.get("alpha", 0.0)', "alpha=0.0", "test_eval.py::test_shares_of_examples_made_easier"),
    "the start does not reach the attack": (
        "epsilon=epsilon, random_start=start,", 'epsilon=epsilon, random_start="none",',
        "test_flags.py::test_evaluation[--random-start]"),
    "CW runs as many steps as PGD": (
        "num_steps=args.cw_steps)", "num_steps=args.num_steps)",
        "test_eval.py::test_evaluation_defaults_are_the_papers"),
    "the step of the evaluation is epsilon / 4": (
        "step_size=str(Fraction(epsilon) / 10), num_steps=20", "step_size=str(Fraction(epsilon) / 4), num_steps=20",
        "test_eval.py::test_evaluation_defaults_are_the_papers"),
    "the pool is ignored": (
        'chosen = self.right() if "pool" in row.params else', "chosen = self.right() if False else",
        "test_eval.py::test_the_pool_shrinks"),
    "of a pool those not attacked count as zeros": (
        "torch.where(chosen[:, None], logits, self.logits)", "logits", "test_eval.py::test_the_pool_shrinks"),
    "any step forgets the last iterate": (
        "        watched(last.requires_grad_())", "        pass",
        "test_attacks.py::test_worst_iterate_keeps_what_the_attack_passes_by"),
    "any step keeps the best iterate": (
        "lowest = torch.where(now < lowest, now, lowest)",
        "lowest = torch.where(now > lowest, now, lowest)",
        "test_attacks.py::test_worst_iterate_keeps_what_the_attack_passes_by"),
    "the shares change places": (
        "torch.stack([before > 1 - alpha, after > before])", "torch.stack([after > before, before > 1 - alpha])",
        "test_train.py::test_the_tally_counts_per_example"),
    "Wilson's interval is Wald's": (
        'proportion_ci(0.95, "wilson")',
        "proportion_ci(0.95)",
        "test_eval.py::test_the_table_names_the_training"),
    "the mask's bits run the other way": (
        "np.packbits(right.cpu().numpy())", 'np.packbits(right.cpu().numpy(), bitorder="little")',
        "test_compare.py::test_the_masks_survive_the_json"),
    # comparisons
    "McNemar's tail leaves out what was seen": (
        "binomtest(gained, gained + lost)",
        "binomtest(gained, gained + lost + 1)",
        "test_compare.py::test_mcnemars_p_is_the_binomial_tests[3-9]"),
    "McNemar's test is one-sided": (
        "binomtest(gained, gained + lost).pvalue",
        'binomtest(gained, gained + lost, alternative="less").pvalue',
        "test_compare.py::test_mcnemars_p_is_the_binomial_tests[3-9]"),
    "gained and lost change places": (
        "int((~a & b).sum()), int((a & ~b).sum())", "int((a & ~b).sum()), int((~a & b).sum())",
        "test_compare.py::test_mcnemars_p_is_the_binomial_tests[3-9]"),
    "Holm is Bonferroni": (
        "(len(p_values) - rank) * p_values[i]", "len(p_values) * p_values[i]", "test_reproduce.py::test_holm_by_hand"),
    "Holm's p may fall again": (
        "max(highest, min(1.0, ", "max(0.0, min(1.0, ", "test_reproduce.py::test_holm_by_hand"),
    "the interval over seeds and images is one of 90 %": (
        "scipy.stats.t.ppf(0.975, freedom)", "scipy.stats.t.ppf(0.95, freedom)",
        "test_compare.py::test_the_interval_over_seeds_and_images_is_welchs"),
    "the p over seeds and images is one-sided": (
        '"p": 2 * float(scipy.stats.t.sf(', '"p": float(scipy.stats.t.sf(',
        "test_compare.py::test_the_interval_over_seeds_and_images_is_welchs"),
    "the interval over seeds leaves out the images": (
        "variance = parts.sum()", "variance = parts[1]",
        "test_compare.py::test_the_interval_over_seeds_and_images_covers_when_both_are_drawn[20-400]"),
    "the estimator forgets the seen images' error": (
        "float(cheap.mean() + error.mean())", "float(cheap.mean())",
        "test_compare.py::test_the_difference_estimator_of_all_images_is_the_paired_difference"),
    "other parameters are compared all the same": (
        "if settings == others and built_on", "if built_on",
        "test_compare.py::test_attacks_with_other_parameters_are_left_out_and_named"),
    "a cell may mix two models": (
        "if sha256 != first:", "if False:",
        "test_reproduce.py::test_a_cell_of_two_models_is_named_and_not_averaged_in"),
    "a lost model is trained anew beside its results": (
        "if not has_model(cell, path):", "if False:",
        "test_reproduce.py::test_a_lost_model_is_not_mixed_with_the_results_that_remain[no run]"),
    "the paper's numbers stand beside any task": (
        'if key[1] in ("digits", "confident"):', "if False:",
        "test_reproduce.py::test_the_papers_numbers_stand_beside_its_task_alone[digits-False]"),
    "what came with the repository was run here": (
        "if all(has_model(cell, path) for path in cell.evaluations())]", "]",
        "test_reproduce.py::test_the_first_line_says_what_was_run_and_what_came_with_the_repository"),
    "results of one's own lie among the repository's": (
        'log = property(lambda self: self.path(self.results_dir,', 'log = property(lambda self: self.path("results",',
        "test_reproduce.py::test_results_dir_keeps_results_apart"),
    "a labeller is trained anew for labels that nothing needs": (
        "if any(missing_and_differing(row)[0] for row in rows if row.after == cell):", "if True:",
        "test_reproduce.py::test_in_a_fresh_clone_a_table_says_that_nothing_was_run[table4-digits-14]"),
    # attacks
    "PGD descends": (
        "x_adv + step_size * gradient.sign()", "x_adv - step_size * gradient.sign()",
        "test_attacks.py::test_pgd_equals_foolbox[ce-none]"),
    "the ball has twice its radius": (
        "(x_adv - x).clamp(-epsilon, epsilon)", "(x_adv - x).clamp(-2 * epsilon, 2 * epsilon)",
        "test_attacks.py::test_pgd_equals_foolbox[ce-none]"),
    "the attack leaves the box": (
        ".clamp(-epsilon, epsilon)).clamp(0, 1)", ".clamp(-epsilon, epsilon)).clamp(-1, 1)",
        "test_attacks.py::test_pgd_equals_foolbox[ce-none]"),
    "the start is not projected": (
        "return project(x + random_start, x, epsilon)", "return x + random_start",
        "test_attacks.py::test_ball_and_box_are_never_left[0.0005-0.1-gaussian]"),
    "a step is left out": (
        "for _ in range(num_steps):\n        x_adv = step(", "for _ in range(num_steps - 1):\n        x_adv = step(",
        "test_attacks.py::test_pgd_equals_foolbox[ce-none]"),
    "FGSM starts at random": (
        'epsilon=epsilon, step_size=epsilon, num_steps=1, random_start="none")',
        "epsilon=epsilon, step_size=epsilon, num_steps=1)",
        "test_attacks.py::test_fgsm_equals_foolbox"),
    "the uniform start is one-sided": (
        "noise.uniform_(-epsilon, epsilon, ", "noise.uniform_(0, epsilon, ",
        "test_attacks.py::test_starts_are_what_their_names_say"),
    "the Gaussian start is as wide as the ball": (
        "normal_(0, 0.001, ", "normal_(0, epsilon, ", "test_attacks.py::test_starts_are_what_their_names_say"),
    "KL's target is not constant": (
        "return model(x.detach().requires_grad_()).detach()", "return model(x.detach().requires_grad_())",
        "test_attacks.py::test_probabilities_are_a_constant"),
    "the model stays frozen": (
        "module.training = True", "pass", "test_attacks.py::test_frozen_restores_after_an_error"),
    "the frozen model stays in train mode": (
        "model.eval().requires_grad_(False)", "model.requires_grad_(False)",
        "test_attacks.py::test_nothing_is_left_behind"),
    "AutoAttack's outcomes are ignored": (
        "robust[standing] = label == y[standing]", "pass",
        "test_autoattack.py::test_equal_to_calling_pyautoattack[10-components3]"),
    "AutoAttack goes on with all images": (
        "chosen & stood, dict", "chosen, dict",
        "test_autoattack.py::test_a_stopped_evaluation_goes_on[stops1-flags1]"),
    "another model's evaluation is taken up": (
        "if heads[0] == heads[1] and not args.save_examples", "if not args.save_examples",
        "test_autoattack.py::test_another_evaluation_begins_anew[flags6]"),
    # losses
    "LSCE smooths over all classes": (
        "(1 - alpha - q_wrong) * _true", "(1 - alpha) * _true",
        "test_losses.py::test_lsce_is_torchs_label_smoothing_with_another_scale[0.3-10]"),
    "TRADES' KL runs the other way": (
        "beta * _kl(logits_nat, logits_adv).mean()", "beta * _kl(logits_adv, logits_nat).mean()",
        "test_losses.py::test_outer_losses_equal_the_papers_formulas"),
    "TRADES' KL has no gradient on the clean image": (
        "beta * _kl(logits_nat, logits_adv).mean()", "beta * _kl(logits_nat.detach(), logits_adv).mean()",
        "test_losses.py::test_trades_has_a_gradient_on_both_arguments"),
    "MART's weight has no gradient": (
        "weight = 1 - p_true(logits_nat, y)", "weight = 1 - p_true(logits_nat, y).detach()",
        "test_losses.py::test_gradients_by_finite_differences[mart]"),
    "MART weighs confident images more": (
        "weight = 1 - p_true(logits_nat, y)", "weight = p_true(logits_nat, y)",
        "test_losses.py::test_outer_losses_equal_the_papers_formulas"),
    "the highest other class may be the true one": (
        'values.scatter(1, y[:, None], float("-inf")).max(dim=1)', "values.max(dim=1)",
        "test_losses.py::test_cw_margin_written_out[50.0]"),
    "kappa has the other sign": (
        "(margin(logits, y) + kappa)", "(margin(logits, y) - kappa)",
        "test_losses.py::test_cw_margin_written_out[50.0]"),
    "BCE has another constant": (
        "torch.log(1.0001 - ", "torch.log(1.01 - ", "test_losses.py::test_outer_losses_equal_the_papers_formulas"),
    "KL's reference gets a gradient": (
        "p_ref.detach().to(", "p_ref.to(",
        "test_losses.py::test_kl_divergence_is_the_sum_over_classes_and_admits_zeros"),
    "half precision stays half": (
        "logits if logits.dtype == torch.float64 else logits.float(), dim=1)", "logits, dim=1)",
        "test_losses.py::test_extreme_logits_stay_finite[cross_entropy-dtype1]"),
    # data
    "the lowest row is never cropped at": (
        "top = torch.randint(2 * padding + 1, ", "top = torch.randint(2 * padding, ",
        "test_data.py::test_augment_draws_every_offset_and_both_flips"),
    "nothing is mirrored": (
        "< (0.5 if mirror else 0.0)", "< 0.0", "test_data.py::test_augment_draws_every_offset_and_both_flips"),
    "crops are taken from the transposed offset": (
        "padded[example, rows[:, :, None], columns[:, None, :]]",
        "padded[example, columns[:, :, None], rows[:, None, :]]",
        "test_data.py::test_crop_and_flip_equal_torchvisions"),
    "pixels are divided by 256": (
        ".div_(255)", ".div_(256)", "test_eval.py::test_attacked_logits_do_not_depend_on_the_batch_size[4]"),
    "test digits are training digits": (
        "else slice(1397, None)", "else slice(997, None)", "test_data.py::test_digits_are_real_and_split"),
    "validation images are trained on": (
        "kept = order[val_size:]", "kept = order", "test_data.py::test_split_holds_out_the_same_images_always"),
    "the last batch is filled with one image": (
        "return order.repeat(math.ceil(steps * size / n))", "return torch.cat([order, order[:1].repeat(steps * size)])",
        "test_data.py::test_every_image_is_in_every_epoch"),
    "a folder's labels are not shuffled with its images": (
        "np.asarray(labels)[order].tolist()", "list(labels)", "test_data.py::test_a_folder_of_class_folders"),
    "images are loaded on their side": (
        "torch.from_numpy(images_nhwc).permute(0, 3, 1, 2)", "torch.from_numpy(images_nhwc).permute(0, 3, 2, 1)",
        "test_data.py::test_a_folder_of_class_folders"),
    "pseudo-labels are not shuffled with their images": (
        "torch.cat([labels, dataset.aux.labels[drawn]])[order]", "torch.cat([labels, dataset.aux.labels[drawn]])",
        "test_rst.py::test_a_batch_is_mixed_shuffled_and_repeatable"),
    # files
    "a failed write leaves half a file": (
        "temporary.unlink(missing_ok=True)", "pass", "test_checkpoints.py::test_a_failed_save_leaves_the_old_file"),
    "the file is written in place": (
        'temporary = path.with_name(f".{path.name}.tmp")', "temporary = path",
        "test_checkpoints.py::test_a_failed_save_leaves_the_old_file"),
    "checksums are not looked at": (
        "if archive.testzip():", "if False:", "test_checkpoints.py::test_no_flipped_or_missing_byte_goes_unseen"),
    "last.prev.pt is not kept": (
        "write_atomically(previous, last.read_bytes())",
        "pass",
        "test_checkpoints.py::test_a_run_keeps_the_checkpoint_before_the_last"),
    "a loaded model is in train mode": (
        "model.to(device).eval(), info", "model.to(device).train(), info",
        "test_checkpoints.py::test_bare_state_dicts_load[wrn-10-1]"),
    "a loaded model is normalised the wrong way round": (
        "(x - self.mean) / self.std", "(x + self.mean) / self.std",
        "test_checkpoints.py::test_a_normalisation_that_the_user_states"),
    "any pickle is loaded": (
        "weights_only=True)\n", "weights_only=False)\n", "test_checkpoints.py::test_code_in_a_file_is_not_run"),
    # the rest
    "alpha 1 is refused": (
        "lambda v: 0 <= v <= 1, ", "lambda v: 0 <= v < 1, ", "test_flags.py::test_evaluation[--alphas]"),
    "bf16 is float32": (
        'torch.bfloat16, enabled=precision == "bf16")', "torch.bfloat16, enabled=False)",
        "test_flags.py::test_train[--precision]"),
    "a rise of the accuracy is a fall": (
        'difference["interval"][0] <= 0', 'difference["interval"][1] >= 0',
        "test_audit.py::test_what_counts_as_raised"),
    "pseudo-labels are the least likely classes": (
        "labels = logits.argmax(1).cpu()", "labels = logits.argmin(1).cpu()",
        "test_rst.py::test_the_rest_of_a_data_set_is_labelled"),
}


def run_tests(folder, tests, snippet=None, replacement=None):
    """Run these tests in a copy of the repository, with a mutant if there is a snippet: pytest's exit code, 0 if all
    pass and 1 if some fail, and its words."""
    copy_repository(folder)
    if snippet:
        mutate(folder, snippet, replacement)
    os.chdir(folder)
    torch.set_num_threads(1)
    options = "-x -q -o addopts= -p no:nbval -p no:cacheprovider".split()
    with contextlib.redirect_stdout(io.StringIO()) as words, contextlib.redirect_stderr(words):
        code = pytest.main([*options, *dict.fromkeys(f"tests/{test}" for test in tests)])
    return int(code), words.getvalue()


def copy_repository(folder):
    shutil.copytree(ROOT / "tests", folder / "tests")
    shutil.copytree(ROOT / "results/table4-digits", folder / "results/table4-digits")  # one test reads it
    for file in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy2(file, folder)


def mutate(folder, snippet, replacement):
    """Replace the snippet in the one top-level file that holds it, once; AssertionError if it stands elsewhere too."""
    texts = {file: file.read_text() for file in folder.glob("*.py")}
    holders = [file for file, text in texts.items() for _ in range(text.count(snippet))]
    assert len(holders) == 1, f"{snippet!r} must stand in one place, not in {[file.name for file in holders]}"
    holders[0].write_text(texts[holders[0]].replace(snippet, replacement))


@pytest.fixture(scope="module")
def pool():
    """Two processes at a time, a new one for each task, forked from one that has imported what takes seconds."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(SLOW_IMPORTS)
    with concurrent.futures.ProcessPoolExecutor(2, server, max_tasks_per_child=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory, pool):
    """{mutant: a future of run_tests} of the mutants that pytest was asked for."""
    futures = {}
    for item in request.session.items:
        if "outcomes" in item.fixturenames:
            name, folder = item.callspec.params["name"], tmp_path_factory.mktemp("mutant") / "copy"
            snippet, replacement, *tests = MUTANTS[name]
            futures[name] = pool.submit(run_tests, folder, tests, snippet, replacement)
    return futures


def test_unbroken_code_passes(tmp_path, pool):
    tests = [test for _, _, *tests in MUTANTS.values() for test in tests]
    code, words = pool.submit(run_tests, tmp_path / "copy", tests).result(timeout=1200)
    assert code == 0, words


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed(name, outcomes):
    code, words = outcomes[name].result(timeout=1200)
    assert code == 1, f"pytest's exit code is {code} (0: it survives): {words}"
