"""Faults put into the code on purpose: ``python tests/mutants.py [--only NAME ...] [--jobs N]``.

Each mutant is applied to a copy of the tree, where the tests that are to find it run until one fails. It prints which
were killed and which survived, and ends with status 1 if any survived. A text that is to be replaced must occur exactly
once: where the code has moved on, the table below must follow. pytest does not collect this file.
"""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 900
"""Seconds after which tests that do not end have found the mutant, too."""


class Mutant(NamedTuple):
    """``old`` of ``unlearn_gym/file`` becomes ``new``.

    ``tests``: files in ``tests`` without ``test_`` and ``.py``, each perhaps with ``::`` and a test that is enough.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def path(self) -> Path:
        return Path("unlearn_gym", self.file)


MUTANTS = [
    # named in issue 15
    Mutant("norms-swapped-in-observation", "run/terms.py", '"retain_grad_norm", "forget_grad_norm")', '"forget_grad_norm", "retain_grad_norm")', "env::test_every_measured_entry_stands_at_its_own_index"),
    Mutant("probe-losses-swapped", "run/run.py", "return forget, retain", "return retain, forget", "run::test_the_probe_losses_are_of_the_forget_set_and_of_heldout_retain_data_in_that_order"),
    Mutant("potential-without-cap", "envs/siss_unlearn.py", "(min(forget, cap) - f0)", "(forget - f0)", "env::test_what_is_forgotten_beyond_the_cap_pays_nothing_more"),
    Mutant("potential-without-floor", "envs/siss_unlearn.py", "max(0.0, retain / r0 - 1.0)", "(retain / r0 - 1.0)", "env::test_damage_costs_its_share_of_the_start_and_repair_pays_nothing"),
    Mutant("streams-seeded-alike", "run/run.py", "manual_seed(seed ^ 2**31)", "manual_seed(seed)", "run::test_the_two_streams_of_a_run_share_nothing_and_both_come_from_the_seed"),
    Mutant("oracle-on-the-models-noise", "metrics/evaluator.py", "s.seed + 2", "s.seed", "metrics::test_the_oracle_and_the_models_and_both_sets_of_samples_come_from_noises_of_their_own"),
    Mutant("non-finite-parameters-pass", "run/terms.py", "values[: last + 1]", "values[:last]", "run::test_one_parameter_that_is_not_finite_is_divergence_though_no_loss_shows_it"),
    # run.py
    Mutant("norms-measured-in-the-wrong-update", "run/run.py", "self.updates % self.settings.norms_period == 0", "(self.updates + 1) % self.settings.norms_period == 0", "run::test_norms_between_measurements_are_the_last_ones_and_say_their_age"),
    Mutant("combined-update-clipped-by-the-retain-norm", "run/run.py", "clip_factor(measured.norms.update", "clip_factor(measured.norms.retain", "run::test_one_combined_backward_pass_makes_the_same_updates"),
    Mutant("gradient-left-with-the-shared-optimizer", "run/run.py", "self.flat.vector.grad = None  # an optimizer that runs share", "pass  # an optimizer that runs share", "stacked"),
    Mutant("stale-gradient-of-a-side-without-rows", "run/run.py", "            if output is None:\n                gradient.zero_()", "            if output is None:\n                pass", "run::test_passes_without_the_samples_of_zero_weight_give_the_same_gradients"),
    Mutant("age-of-norms-not-restored", "run/run.py", "self._known_norms, self._norms_age = snapshot.known_norms, snapshot.norms_age", "self._known_norms = snapshot.known_norms", "objectives::test_norms_in_every_third_update_change_no_update_and_keep_their_age"),
    Mutant("weight-decay", "run/run.py", "weight_decay=0.0", "weight_decay=0.01", "step"),
    Mutant("model-left-in-training-mode", "run/run.py", "self.model = model.eval()", "self.model = model.train()", "step"),
    Mutant("hybrid-update-norm-without-the-direct-gradient", "run/run.py", "norms._replace(direct=direct, update=update)", "norms._replace(direct=direct)", "sfd"),
    Mutant("fresh-norms-swapped", "run/run.py", "[[0, 2, 1, 3]]", "[[0, 2, 3, 1]]", "env::test_fresh_entries_are_losses_and_gradient_norms_of_each_sides_own_data"),
    Mutant("fresh-features-from-the-update-stream", "run/run.py", "batch = self.draw(self.measure_generator)\n", "batch = self.draw(self.generator)\n", "run::test_update_batches_do_not_depend_on_lambda_or_on_measurements"),
    Mutant("data-set-sizes-as-shipped", "run/run.py", "data.forget_size or len(data.forget)", "len(data.forget)", "run::test_dataset_factors_of_a_part_are_those_of_the_whole_that_it_stands_for"),
    Mutant("measuring-stream-not-restored", "run/run.py", "self.measure_generator.set_state(snapshot.generators[1])", "pass", "run::test_restored_run_continues_bit_for_bit"),
    # step.py
    Mutant("negligible-share-inverted", "run/terms.py", "negligible.float().mean()", "1 - negligible.float().mean()", "step"),
    Mutant("forget-fraction-inverted", "run/terms.py", "from_forget.float().mean()", "1 - from_forget.float().mean()", "step"),
    Mutant("another-effective-sample-size", "run/terms.py", "weights.sum().square() / weights.square().sum()", "weights.sum() / weights.max()", "step"),
    Mutant("gradients-blown-up-to-the-bound", "run/gradients.py", ".clamp(max=1.0)", "", "step"),
    Mutant("vanished-forget-gradient-divided-by", "run/gradients.py", "(forget > 0) & ", "", "step"),
    Mutant("projection-unclamped", "run/gradients.py", "missing.clamp_min(0.0)", "missing", "objectives::test_erasediffs_update_descends_the_forget_term_as_fast_as_is_asked"),
    Mutant("last-timestep-never-drawn", "run/batch.py", "torch.randint(num_timesteps, ", "torch.randint(num_timesteps - 1, ", "step"),
    Mutant("half-of-the-retain-data-never-drawn", "run/batch.py", "torch.randint(len(data.retain), ", "torch.randint(len(data.retain) // 2, ", "step"),
    Mutant("half-of-the-forget-data-never-drawn", "run/batch.py", "torch.randint(len(data.forget), ", "torch.randint(len(data.forget) // 2, ", "step"),
    Mutant("uniforms-too-small", "run/batch.py", "torch.rand(size, generator=generator, device=device)", "0.8 * torch.rand(size, generator=generator, device=device)", "step"),
    Mutant("variance-slope-of-another-multiplier", "run/terms.py", "second_moment_slope(terms, products, norms.forget_multiplier)", "second_moment_slope(terms, products, forget_scale)", "step"),
    Mutant("terms-handed-out-without-a-copy", "run/terms.py", "self.second_moment.copy()", "self.second_moment", "step"),
    # stacked.py
    Mutant("stack-updates-the-first-rows", "run/stacked.py", "self.matrix[list(lambdas)]", "self.matrix[: len(lambdas)]", "stacked"),
    Mutant("stack-forgets-the-optimizers-state", "run/stacked.py", "self.optimizer.state |= run.optimizer.state", "pass", "stacked"),
    Mutant("stack-hides-divergence-from-its-runs", "run/stacked.py", "self.runs[i].diverged = one.diverged", "pass", "stacked"),
    Mutant("stack-does-not-count-updates", "run/stacked.py", "run.updates += 1", "pass", "stacked"),
    Mutant("stack-does-not-clip", "run/stacked.py", "clip_factor(norms.update, self.settings.max_grad_norm)", "clip_factor(norms.update, None)", "stacked"),
    # siss.py
    Mutant("a-uniform-of-zero-draws-forget-data-at-lambda-0", "math/siss.py", "from_forget = uniforms < lambda_", "from_forget = uniforms <= lambda_", "siss"),
    Mutant("score-divided-by-zero-at-lambda-0", "math/siss.py", "probability.clamp_min(tiny)", "probability", "siss"),
    Mutant("score-divided-by-zero-at-lambda-1", "math/siss.py", "(1.0 - probability).clamp_min(tiny)", "(1.0 - probability)", "siss"),
    Mutant("pathwise-gradient-of-the-other-sign", "math/siss.py", "pathwise = (losses_f - losses_r) * (w_f - w_r)", "pathwise = (losses_r - losses_f) * (w_f - w_r)", "siss"),
    Mutant("moment-without-its-cross-term", "math/siss.py", "products[0] - 2.0 * forget_multiplier * products[1]", "products[0]", "siss"),
    # objectives
    Mutant("learner-with-momentum", "run/objectives/base.py", "betas=(0.0, 0.999)", "betas=(0.9, 0.999)", "sfd"),
    Mutant("learner-not-clipped", "run/objectives/base.py", "nn.utils.clip_grad_norm_([self.flat.vector], max_grad_norm)", "pass", "sfd"),
    Mutant("learners-optimizer-not-restored", "run/objectives/base.py", "restore_optimizer(self.optimizer, self.flat.vector, optimizer)", "pass", "sfd"),
    Mutant("encoder-of-each-side-learns-where-stopped", "run/objectives/latent.py", "            with _encoding(context):\n                posterior", "            with nullcontext():\n                posterior", "vae"),
    Mutant("divergence-without-its-coefficient", "run/objectives/latent.py", "s.kl_coef * side.posterior.divergence()", "side.posterior.divergence()", "vae"),
    Mutant("hybrid-reports-the-fraction-of-its-classes", "run/objectives/score_forgetting.py", "from_forget=draw.from_forget, ", "", "sfd"),
    Mutant("override-is-the-class-before", "run/objectives/score_forgetting.py", "(c for c in kept if c > old), kept[0]", "(c for c in kept if c < old), kept[0]", "sfd"),
    Mutant("half-of-the-neighbours", "run/objectives/epsilon.py", "NUM_NEIGHBOURS = 10", "NUM_NEIGHBOURS = 5", "objectives"),
    Mutant("scale-differentiated", "math/sfd.py", "(samples - real).detach().abs()", "(samples - real).abs()", "sfd"),
    # envs
    Mutant("smoothness-against-the-first-lambda", "envs/siss_unlearn.py", "(terms.lambda_ - self._lambda) ** 2", "(terms.lambda_ - s.lambda_init) ** 2", "env::test_the_penalty_is_on_the_change_from_one_lambda_to_the_next"),
    Mutant("potential-without-smoothness", "envs/siss_unlearn.py", '"potential": self._potential - potential_before, "smoothness": smoothness}', '"potential": self._potential - potential_before, "smoothness": 0.0}', "env::test_the_penalty_is_on_the_change_from_one_lambda_to_the_next"),
    Mutant("potential-of-the-last-episode", "envs/siss_unlearn.py", "        self._observe(terms)\n        self._potential = self._current_potential(terms)", "        self._observe(terms)", "env::test_an_episode_does_not_depend_on_those_before"),
    Mutant("history-of-all-episodes", "envs/siss_unlearn.py", "        self.history, self._ended = [], False\n", "        self._ended = False\n", "env::test_an_episode_does_not_depend_on_those_before"),
    Mutant("actions-somewhat-out-of-range-pass", "envs/actions.py", "ACTION_TOLERANCE = 1e-6", "ACTION_TOLERANCE = 1e-3", "env::test_a_bad_action_is_named_and_changes_nothing"),
    Mutant("rounded-actions-not-brought-into-range", "envs/actions.py", "within = min(max(lambda_, lambda_min), lambda_max)", "within = lambda_", "env::test_an_action_that_is_off_by_rounding_becomes_the_bound"),
    Mutant("a-vanished-loss-has-no-logarithm", "envs/siss_unlearn.py", "np.log(np.maximum(ratio, tiny))", "np.log(ratio)", "env::test_a_loss_that_an_objective_leaves_out_is_at_the_lower_bound"),
    Mutant("reset-while-due-resets-again", "envs/group.py", "        for i in found:\n            self.due[i] = False", "        pass", "vector::test_a_reset_of_episodes_that_had_ended_is_their_only_one"),
    Mutant("deaths-add-up-over-an-episode", "envs/pool.py", "self.workers[number].deaths = 0", "pass", "vector::test_deaths_with_a_step_in_between_never_add_up"),
    Mutant("observations-of-a-step-are-the-environments-own", "envs/vector.py", "self._obs.copy(), np.array(rewards", "self._obs, np.array(rewards", "vector::test_what_a_step_returns_is_the_callers_own"),
    Mutant("episodes-after-a-death-unseeded", "envs/vector.py", "super().reset(seed=int(seed))  # for", "pass  # for", "vector::test_episodes_that_begin_after_a_death_come_from_the_seed"),
    Mutant("seeds-of-sb3-used-for-every-reset", "envs/sb3.py", "self._reset_seeds()", "pass", "vector::test_sb3_sees_what_it_sees_of_single_environments"),
    Mutant("reset-infos-of-sb3-not-renewed", "envs/sb3.py", "self.reset_infos[i] = infos[i]", "pass", "vector::test_sb3_sees_what_it_sees_of_single_environments"),
    Mutant("extended-samples-biased-deviation", "envs/features.py", "ddof=1", "ddof=0", "features::test_the_groups_are_what_they_say"),
    Mutant("extended-entries-unclipped", "envs/features.py", "np.clip(np.nan_to_num(entries, nan=np.inf), -FEATURE_CLIP, FEATURE_CLIP)", "np.nan_to_num(entries, nan=np.inf)", "features::test_nan_weights_count_as_the_upper_bound features::test_divergence_and_weights_beyond_all_bounds_leave_it_finite"),
    # evaluation
    Mutant("attack-with-its-sides-swapped", "metrics/evaluator.py", "membership_auc(forget.mean(0), unseen.mean(0))", "membership_auc(unseen.mean(0), forget.mean(0))", "metrics::test_losses_errors_and_the_attack_are_those_of_their_own_sets"),
    Mutant("profile-over-samples", "metrics/evaluator.py", "return forget.mean(1).tolist()", "return forget.mean(0).tolist()", "metrics::test_losses_errors_and_the_attack_are_those_of_their_own_sets"),
    Mutant("oracle-error-of-forget-data-alone", "metrics/evaluator.py", "torch.stack(errors).mean().item()", "errors[0].item()", "metrics::test_losses_errors_and_the_attack_are_those_of_their_own_sets"),
    Mutant("mean-distance-to-copies", "metrics/evaluator.py", "closest.distance.median()", "closest.distance.mean()", "metrics"),
    Mutant("copies-against-all-labels", "metrics/judge.py", "return heldout[alike] if alike.any() else heldout", "return heldout", "metrics"),
    Mutant("references-of-another-classifier", "metrics/judge.py", "key = (task.classifier, digest)", "key = (task.name, digest)", "metrics"),
    Mutant("pixels-beyond-the-range-count", "metrics/forgetting.py", "flat.clamp(-1, 1)", "flat", "metrics"),
    Mutant("copies-from-a-hundredth-on", "metrics/forgetting.py", "COPY_QUANTILE = 0.001", "COPY_QUANTILE = 0.01", "metrics"),
    Mutant("ssim-of-pixels-beyond-the-range", "metrics/quality.py", "(x.clamp(-1, 1) + 1) / 2", "(x + 1) / 2", "metrics"),
    Mutant("kid-of-a-square", "metrics/quality.py", "kernel * kernel * kernel", "kernel * kernel", "metrics"),
    Mutant("prior-term-of-the-other-sign", "metrics/likelihood.py", "- torch.log1p(-alpha_bar))", "+ torch.log1p(-alpha_bar))", "likelihood"),
    Mutant("posterior-variance-for-points", "metrics/likelihood.py", "return 0.5 * (ratio - 1 - ratio.log()), factors", "return torch.zeros_like(ratio), factors", "likelihood"),
    Mutant("solver-heeds-the-mean-sample", "metrics/likelihood.py", ".mean(1).max() for v in state", ".mean() for v in state", "likelihood"),
    Mutant("score-without-cap", "comparison/results.py", "(min(forget_loss, cap) - f0)", "(forget_loss - f0)", "results"),
    Mutant("score-without-floor", "comparison/results.py", "max(0.0, retain_loss / r0 - 1.0)", "(retain_loss / r0 - 1.0)", "results"),
    Mutant("fair-static-with-hindsight", "comparison/results.py", "for o in common if o != s]", "for o in common]", "results"),
    Mutant("worst-static-for-best", "comparison/results.py", "return max(static, key=lambda p: self.estimate", "return min(static, key=lambda p: self.estimate", "results"),
    Mutant("diverged-policies-ranked", "comparison/results.py", "(*REFERENCES, FINETUNE, *self.diverged)", "(*REFERENCES, FINETUNE)", "results"),
    Mutant("scores-at-the-settings-rate", "comparison/results.py", 'self.score(cell["metrics"], retain_coef) for cell', 'self.score(cell["metrics"], 10.0) for cell', "results"),
    Mutant("intervals-of-ninety-percent", "math/statistics.py", "[2.5, 97.5]", "[5, 95]", "statistics"),
    Mutant("ties-won", "math/statistics.py", "+ 0.5 * np.equal", "+ 1.0 * np.equal", "statistics"),
    Mutant("holm-not-monotone", "math/statistics.py", "= largest = max(largest, min(", "= largest = max(0.0, min(", "statistics"),
    Mutant("seeds-resampled-apart", "math/statistics.py", "((counts @ wins) * counts).sum(axis=1)", "((counts @ wins) * counts[::-1]).sum(axis=1)", "statistics"),
    Mutant("crossing-strictly-above", "comparison/matched.py", "point.forget_loss >= level", "point.forget_loss > level", "statistics"),
    Mutant("runs-go-on-after-divergence", "comparison/matched.py", "            break\n        points.append", "            continue\n        points.append", "statistics"),
    Mutant("levels-evenly-apart", "comparison/matched.py", "start * (cap / start) ** share", "start + (cap - start) * share", "statistics"),
    # mutants that the tests had missed in a review
    Mutant("a-removed-lock-is-held", "system/locks.py", "return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))", "return True", "file_writing"),
    Mutant("a-vanished-folder-ends-it", "system/locks.py", "and attempt < MOST_ATTEMPTS", "and False", "file_writing::test_a_folder_that_vanishes_while_it_is_locked_is_made_again"),
    Mutant("a-picture-too-many", "comparison/records.py", "0 <= hit < self.forget.shape[0]", "0 <= hit <= self.forget.shape[0]", "comparison::test_a_picture_beyond_the_last_one_is_refused"),
    Mutant("a-zip-of-any-size", "policies/sb3_file.py", "if size > MAX_BYTES[name]:", "if False:", "agent_files::test_an_entry_too_large_for_an_agent_is_not_unpacked"),
    Mutant("a-second-lock-hides-the-first", "system/locks.py", "_held.set(_held.get() | {key})", "_held.set(frozenset({key}))", "file_writing::test_a_lock_of_a_second_folder_keeps_the_first"),
    Mutant("a-folder-in-the-way-for-a-moment-ends-it", "system/locks.py", "FileNotFoundError | FileExistsError", "FileNotFoundError", "file_writing::test_a_folder_that_is_in_the_way_for_a_moment_is_tried_again"),
    Mutant("a-lock-keeps-the-end-of-a-longer-one", "system/locks.py", "os.ftruncate(descriptor, 0)", "pass", "file_writing::test_what_a_killed_process_left_is_overwritten_as_a_whole"),
    Mutant("any-file-is-a-lock", "system/locks.py", "                _refuse_foreign(descriptor, folder)\n", "", "file_writing::test_a_file_of_the_users_own_in_the_locks_place_is_left_as_it_is"),
    Mutant("a-removed-lock-takes-the-next-with-it", "system/locks.py", "if ours and _is_still(path, descriptor):", "if ours:", "file_writing::test_a_lock_that_was_removed_under_its_holder_does_not_end_the_next_ones"),
    Mutant("a-forked-process-holds-the-lock", "system/locks.py", " and hold.pid == os.getpid()", "", "file_writing::test_a_forked_process_is_not_the_holder_and_does_not_end_the_lock"),
    Mutant("a-forked-process-ends-the-lock", "system/locks.py", "hold.pid == os.getpid()  # a forked", "True  # a forked", "file_writing::test_a_forked_process_is_not_the_holder_and_does_not_end_the_lock"),
    Mutant("an-ended-lock-is-held-by-its-tasks", "system/locks.py", "key.ended = True", "pass", "file_writing::test_a_task_that_outlives_the_block_does_not_hold_the_lock"),
    Mutant("too-much-data-passes", "comparison/records.py", "decompress(packed, wanted + 1)", "decompress(packed, wanted)", "comparison::test_samples_have_as_many_bytes_as_their_shape_says"),
    Mutant("a-stale-checksum-is-kept", "comparison/records.py", "    content.pop(CHECKSUM, None)\n", "", "comparison::test_results_that_were_changed_on_purpose_are_written_with_a_new_checksum"),
    Mutant("an-infinite-number-is-a-measurement", "comparison/records.py", ", allow_inf_nan=False", "", "comparison::test_a_number_that_is_not_finite_is_no_measurement"),
    # files of saved models
    Mutant("a-header-of-any-length", "tasks/saving.py", "if text is not None and len(text) > LONGEST_HEADER:", "if False:", "saving::test_a_header_longer_than_any_is_not_parsed"),
    Mutant("a-lying-header-is-allocated", "tasks/saving.py", ', torch.device("meta")', "", "saving::test_nothing_of_the_size_that_a_lying_header_claims_is_allocated"),
    Mutant("a-missing-library-is-a-fault-of-the-file", "tasks/saving.py", "    except SettingsError:\n        raise\n", "", "diffusers::test_a_saved_model_without_the_library_names_the_library"),
    Mutant("members-of-a-family-warn", "tasks/saving.py", 'header.task.partition(":")[0] != task.name.partition(":")[0]', "header.task != task.name", "saving::test_a_model_of_one_member_of_a_family_is_loaded_for_another_without_a_word"),
    Mutant("another-network-of-the-same-shapes", "tasks/saving.py", "    if difference:\n", "    if False:\n", "diffusers::test_a_model_is_not_read_as_one_that_predicts_something_else saving::test_a_network_that_differs_in_what_no_shape_shows_is_another"),
    Mutant("arguments-left-out-are-another-network", "tasks/saving.py", "found, wanted = completed(found), completed(wanted)", "pass", "diffusers::test_a_model_is_read_back_after_its_folder_has_moved_and_been_written_again"),
    Mutant("a-header-of-any-depth", "tasks/saving.py", "    if beyond:", "    if False:", "diffusers::test_a_header_of_a_network_of_very_many_layers_builds_none"),
    Mutant("an-empty-task-is-none", "tasks/saving.py", "header is not None and task is None else task", "header is not None and not task else task", "saving::test_a_task_without_a_name_is_no_missing_task"),
    Mutant("an-empty-task-is-the-default", "cli/evidence.py", "DEFAULT_TASK if task is None else task", "task or DEFAULT_TASK", "cli::test_a_file_of_weights_is_evaluated_on_its_own_task_or_on_a_given_one"),
    Mutant("another-task-untold", "cli/evidence.py", "    if note is not None:", "    if False:", "cli::test_a_file_of_a_task_by_another_name_is_evaluated_with_one_line_of_warning"),
    Mutant("recurrent-layers-are-not-counted", "policies/sb3.py", 'needed += 4 * hidden**2 * arguments.get("n_lstm_layers", 1)', "pass", "agent_files::test_layers_of_more_weights_than_the_file_holds_are_not_built"),
    Mutant("an-expanded-tensor-counts-in-full", "policies/sb3.py", "w.untyped_storage().nbytes() // w.itemsize for", "w.numel() for", "agent_files::test_a_tensor_that_shows_one_number_a_billion_times_counts_as_one"),
    Mutant("statistics-clipped-at-zero", "policies/normalization.py", "if not found.clip > 0", "if found.clip < 0", "agent_files::test_statistics_that_cannot_be_used_are_refused"),
    Mutant("statistics-of-one-byte-order", "policies/normalization.py", 'byte_order not in ("<", ">")', 'byte_order not in ("<",)', "agent_files::test_statistics_with_numpys_numbers_in_them_are_what_they_say"),
    Mutant("replaced-parameters-go-unnoticed", "models/flat.py", "return all(parameters.get(name) is parameter", "return True or all(parameters.get(name) is parameter", "torch_state::test_parameters_that_the_run_does_not_train_are_noticed_before_anything_is_drawn"),
    Mutant("replaced-data-goes-unnoticed", "models/flat.py", "if parameter.data_ptr() != place:", "if False:", "torch_state::test_parameters_that_the_run_does_not_train_are_noticed_before_anything_is_drawn"),
    # actions
    Mutant("a-strength-lasts", "run/gradients.py", "constant = settings.forget_grad_norm if strength is None else strength", "constant = settings.forget_grad_norm", "actions::test_a_strength_is_the_rules_constant_for_this_update_alone"),
    Mutant("a-scaled-step-scales-the-next", "run/run.py", '        group["lr"] = learning_rate\n', "        pass\n", "actions::test_a_step_is_as_many_times_as_long_and_the_next_one_is_not"),
    Mutant("stacked-steps-are-not-scaled", "run/stacked.py", "vector.copy_(start + scale * (vector - start))", "pass", "actions::test_stacked_runs_take_strength_and_scale_of_each_run_alone"),
    Mutant("a-strength-under-the-loss-rule", "run/gradients.py", 'return settings.forget_grad_rule != "loss" and', "return", "actions::test_a_strength_where_no_rule_has_it_is_refused"),
    Mutant("a-stopped-episode-goes-on", "envs/siss_unlearn.py", "if self._ended or ", "if ", "actions::test_an_action_may_end_the_episode_with_its_update"),
    Mutant("stop-of-stacked-runs-is-lost", "envs/group.py", "advance(terms[i], stop=action.stop)", "advance(terms[i])", "actions::test_an_action_may_end_the_episode_with_its_update"),
]  # fmt: skip
"""One mutant for each kind of fault; mutants without an observable effect are omitted."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="mutants whose names hold one of these")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at once")
    parser.add_argument("--check", action="store_true", help="only look whether the table fits the code")
    args = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not args.only or any(part in m.name for part in args.only)]
    faults = table_errors(MUTANTS) or ([] if chosen else [f"no mutant is named like {args.only}"])
    if faults or args.check:
        print("\n".join(faults) or f"{len(MUTANTS)} mutants fit the code")
        return 1 if faults else 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        return run_all(chosen, args.jobs, Path(folder))


def table_errors(mutants: Sequence[Mutant]) -> list[str]:
    """A line for each mutant that is not applicable, or whose name another has."""
    names = [m.name for m in mutants]
    lines = [f"{name}: two mutants have this name" for name in sorted({n for n in names if names.count(n) > 1})]
    for m in mutants:
        count = (ROOT / m.path).read_text().count(m.old)
        if count != 1:
            lines.append(f"{m.name}: {m.path} holds {m.old!r} {count} times, not once; mend the table")
        lines += [f"{m.name}: there is no {test}" for test in tests_of(m) if not test_exists(test)]
    return lines


def test_exists(name: str) -> bool:
    file, _, test = name.partition("::")
    return (ROOT / file).is_file() and (not test or f"def {test}(" in (ROOT / file).read_text())


def tests_of(mutant: Mutant) -> list[str]:
    """pytest's names of the tests that are to find the mutant."""
    parts = (name.partition("::") for name in mutant.tests.split())
    return [f"tests/test_{file}.py{separator}{test}" for file, separator, test in parts]


def run_all(chosen: Sequence[Mutant], jobs: int, folder: Path) -> int:
    copies: Queue[Path] = Queue()
    for i in range(jobs):
        copies.put(copy_tree(folder / str(i)))
    with ThreadPoolExecutor(jobs) as pool:
        status = run_tests(copies, None, sorted({test for m in chosen for test in tests_of(m)}))
        if status != 0:
            print(f"without any mutant these tests fail (pytest: {status}), so that nothing follows from them")
            return 1
        survivors = []
        for m, status in zip(chosen, pool.map(lambda m: run_tests(copies, m, tests_of(m)), chosen), strict=True):
            verdict = {0: "SURVIVED", 1: "killed", None: "killed (no end)"}.get(status, f"broken (pytest: {status})")
            survivors += [m.name] * (not verdict.startswith("killed"))
            print(f"{verdict:10} {m.name} ({m.tests})", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - len(survivors)} killed, {len(survivors)} not: {', '.join(survivors)}")
    return 1 if survivors else 0


def copy_tree(target: Path) -> Path:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def run_tests(copies: Queue[Path], mutant: Mutant | None, tests: Sequence[str]) -> int | None:
    """pytest's exit status for ``tests`` on a copy of the tree with the mutant in it; None where it does not end."""
    tree = copies.get()
    whole = None if mutant is None else (tree / mutant.path).read_text()
    try:
        if mutant is not None and whole is not None:
            (tree / mutant.path).write_text(whole.replace(mutant.old, mutant.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=TIMEOUT, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        if mutant is not None and whole is not None:
            (tree / mutant.path).write_text(whole)
        copies.put(tree)


if __name__ == "__main__":
    sys.exit(main())
