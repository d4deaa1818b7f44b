//! What the tests of the forest share: random settings, rewards by table, a loop of ask and tell.
#![allow(dead_code)] // each test file uses a part

use dynadepth_core::rng::SplitMix64;
use dynadepth_core::{EditPrior, Forest, ForestSpec, Result, SearchConfig, Selection};
use proptest::prelude::*;

/// A reward that follows from a seed and the plan alone, in steps of 1/8 so that ties happen.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn reward(seed: u64, plan: &[u8]) -> f64 {
    let mixed = plan.iter().fold(seed, |hash, &action| {
        SplitMix64::keyed(hash, u64::from(action)).next_u64()
    });
    SplitMix64::new(mixed).below(33) as f64 / 8.0 - 2.0
}

/// A seed for the rewards of a tree.
pub(crate) fn tree_seed(seed: u64, key: u64) -> u64 {
    SplitMix64::keyed(seed, key).next_u64()
}

/// Settings that any forest of `num_layers` layers takes.
pub(crate) fn configs(num_layers: u32) -> impl Strategy<Value = SearchConfig> {
    let caps = (
        1_u32..40,
        prop::collection::vec(0..num_layers, 0..2),
        prop::sample::select(vec![1.0, 1.25, 2.0]),
        0_u32..4,
        0_u32..6,
    );
    let weights = (
        prop::sample::select(vec![0.0, 0.5, 3.0]),
        prop::sample::select(vec![0.0, 0.5, 3.0]),
        prop::sample::select(vec![0.0, 0.03, 1.0]),
        prop::sample::select(vec![0.0, 0.0, 0.3]),
    );
    let rules = vec![Selection::Posterior, Selection::Puct, Selection::DrLlm];
    let rounds = (0_u32..3, 1_u32..7, prop::sample::select(rules));
    let model = (
        prop::sample::select(vec![0.0, 0.03, 1.0]),
        prop::sample::select(vec![0.01, 0.5]),
    );
    (caps, weights, rounds, model).prop_map(
        |(
            (max_evaluations, protect, max_depth, max_repeats, max_edits),
            (depth_penalty, exploration, virtual_loss, random_child),
            (probe_trees, round_size, selection),
            (interaction, noise),
        )| SearchConfig {
            max_evaluations,
            depth_penalty,
            exploration,
            selection,
            interaction,
            noise,
            protect,
            max_depth,
            max_repeats,
            max_edits,
            virtual_loss,
            probe_trees,
            round_size,
            random_child,
            ..SearchConfig::default()
        },
    )
}

/// Forests of up to 5 layers and 3 trees, with a prior or without.
pub(crate) fn specs() -> impl Strategy<Value = ForestSpec> {
    (1_u32..6).prop_flat_map(|num_layers| {
        let prior = prop::option::of(prop::collection::vec(-2.0..2.0, 2 * num_layers as usize));
        let keys = prop::collection::vec(any::<u64>(), 1..4);
        (configs(num_layers), any::<u64>(), keys, prior).prop_map(
            move |(config, seed, tree_keys, prior)| ForestSpec {
                num_layers: num_layers as usize,
                config,
                seed,
                tree_keys,
                prior: prior.map(|mean| EditPrior {
                    variance: vec![1.0; mean.len()],
                    mean,
                    count: 4,
                }),
            },
        )
    })
}

/// Asks and tells until the forest is finished; returns all plans of each tree in the order asked.
pub(crate) fn finish(forest: &mut Forest, max_plans: usize) -> Result<Vec<Vec<Vec<u8>>>> {
    let spec = forest.spec().clone();
    let mut asked = vec![Vec::new(); forest.num_trees()];
    while !forest.is_finished() {
        let batch = forest.ask(max_plans)?;
        let mut rewards = Vec::new();
        for (&tree, plan) in batch.tree.iter().zip(batch.plans.chunks(spec.num_layers)) {
            let key = spec.tree_keys[tree as usize];
            rewards.push(reward(tree_seed(spec.seed, key), plan));
            asked[tree as usize].push(plan.to_vec());
        }
        forest.tell(&batch.ticket, &rewards)?;
    }
    Ok(asked)
}

/// All plans of `num_layers` layers.
pub(crate) fn all_plans(num_layers: usize) -> Vec<Vec<u8>> {
    let mut plans = vec![Vec::new()];
    for _ in 0..num_layers {
        plans = plans
            .into_iter()
            .flat_map(|plan| {
                (0..3).map(move |action| {
                    let mut longer = plan.clone();
                    longer.push(action);
                    longer
                })
            })
            .collect();
    }
    plans
}

/// Whether a plan keeps the caps, by their definition.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn keeps_caps(plan: &[u8], config: &SearchConfig) -> bool {
    let count = |action: u8| {
        plan.iter()
            .map(|&other| usize::from(other == action))
            .sum::<usize>()
    };
    let visits: u32 = plan.iter().map(|&action| u32::from(action)).sum();
    visits >= 1
        && f64::from(visits) <= config.max_depth * plan.len() as f64 + 1e-9
        && count(2) <= config.max_repeats as usize
        && plan.len() - count(1) <= config.max_edits as usize
        && config
            .protect
            .iter()
            .all(|&layer| plan[layer as usize] == 1)
}
