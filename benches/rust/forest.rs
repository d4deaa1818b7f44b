//! How long the search takes to ask and tell, without any model: whole searches, and one large tree.
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use dynadepth_core::rng::SplitMix64;
use dynadepth_core::{EditPrior, Forest, ForestSpec, Result, SearchConfig};

const NUM_LAYERS: usize = 30;

/// Additive effects that differ from tree to tree: cheap, and the search has something to find.
fn reward(tree: u32, plan: &[u8]) -> f64 {
    plan.iter()
        .enumerate()
        .filter(|(_, &action)| action != 1)
        .map(|(layer, &action)| {
            let edit = (layer * 3) as u64 + u64::from(action);
            -SplitMix64::keyed(u64::from(tree), edit).unit()
        })
        .sum()
}

fn forest(num_trees: u64, config: &SearchConfig) -> Result<Forest> {
    let mut rng = SplitMix64::new(7);
    let mean: Vec<f64> = (0..2 * NUM_LAYERS).map(|_| -rng.unit()).collect();
    Forest::new(ForestSpec {
        num_layers: NUM_LAYERS,
        config: config.clone(),
        seed: 0,
        tree_keys: (0..num_trees).collect(),
        prior: Some(EditPrior {
            variance: vec![0.1; mean.len()],
            mean,
            count: 8,
        }),
    })
}

/// Runs a search until each tree has spent its evaluations.
fn search(forest: &mut Forest) -> Result<()> {
    while !forest.is_finished() {
        let batch = forest.ask(4096)?;
        let rewards: Vec<f64> = batch
            .tree
            .iter()
            .zip(batch.plans.chunks(NUM_LAYERS))
            .map(|(&tree, plan)| reward(tree, plan))
            .collect();
        forest.tell(&batch.ticket, &rewards)?;
    }
    Ok(())
}

fn whole_searches(criterion: &mut Criterion) -> Result<()> {
    let mut group = criterion.benchmark_group("search");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(3));
    for (num_trees, max_evaluations) in [(64, 24), (1000, 24), (64, 240), (1, 10_000)] {
        let config = SearchConfig {
            max_evaluations,
            ..SearchConfig::default()
        };
        let start = forest(num_trees, &config)?;
        group.throughput(Throughput::Elements(num_trees * u64::from(max_evaluations)));
        let name = format!("{num_trees} trees, {max_evaluations} evaluations");
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter_batched_ref(
                || start.clone(),
                |forest| assert!(search(black_box(forest)).is_ok()),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
    Ok(())
}

fn main() -> Result<()> {
    let mut criterion = Criterion::default().configure_from_args();
    whole_searches(&mut criterion)?;
    criterion.final_summary();
    Ok(())
}
