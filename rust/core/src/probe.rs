//! The probe: every single edit, on a few trees, to learn what each does on average.

use crate::edits::{target, Limits};
use crate::evaluation::Evaluation;
use crate::plan::EXECUTE;
use crate::rng::SplitMix64;
use crate::spec::ForestSpec;

/// Chooses the trees to probe, ascending: those whose key hashes lowest, so that the order of the trees matters only
/// between equal keys.
pub(crate) fn choose_trees(spec: &ForestSpec) -> Vec<usize> {
    let hash = |&tree: &usize| SplitMix64::keyed(!spec.seed, spec.tree_keys[tree]).next_u64();
    let mut trees: Vec<usize> = (0..spec.tree_keys.len()).collect();
    trees.sort_by_key(hash);
    trees.truncate(spec.config.probe_trees as usize);
    trees.sort_unstable();
    trees
}

/// The edits to probe, ascending: those that some legal plan contains, even if not one alone.
pub(crate) fn edits(limits: &Limits) -> Vec<usize> {
    (0..limits.num_edits())
        .filter(|&edit| limits.reaches(edit))
        .collect()
}

/// Returns the change of reward by each edit that a probed tree has been told, against its identity plan.
pub(crate) fn changes(evaluations: &[Evaluation], limits: &Limits) -> Vec<Option<f64>> {
    let mut changes = vec![None; limits.num_edits()];
    let base = evaluations.first().and_then(|identity| identity.reward);
    for (edit, change) in changes.iter_mut().enumerate() {
        let (layer, action) = target(edit, limits.num_edits() / 2);
        let is_edit = |evaluation: &&Evaluation| {
            let edited = evaluation
                .plan
                .iter()
                .filter(|&&other| other != EXECUTE)
                .count();
            evaluation.plan[layer] == action && edited == 1
        };
        let reward = evaluations
            .iter()
            .find(is_edit)
            .and_then(|evaluation| evaluation.reward);
        *change = reward.zip(base).map(|(reward, base)| reward - base);
    }
    changes
}
