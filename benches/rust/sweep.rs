//! How long it takes to plan a sweep, by number of plans and layers.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use dynadepth_core::rng::SplitMix64;
use dynadepth_core::SweepPlan;

/// Plans with up to four edits each, as a search asks them, for prompts of 40 plans.
fn batch(num_plans: usize, num_layers: usize) -> (Vec<u8>, Vec<u32>) {
    let mut rng = SplitMix64::new(1);
    let mut plans = vec![1_u8; num_plans * num_layers];
    for plan in plans.chunks_mut(num_layers) {
        for _ in 0..4 {
            plan[rng.below(num_layers)] = if rng.below(4) == 0 { 2 } else { 0 };
        }
    }
    let example = (0..num_plans)
        .map(|row| u32::try_from(row / 40).unwrap_or(0))
        .collect();
    (plans, example)
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("plan_sweep");
    for (num_plans, num_layers) in [(40, 30), (640, 30), (640, 80), (10_240, 30)] {
        let (plans, example) = batch(num_plans, num_layers);
        group.throughput(Throughput::Elements(num_plans as u64));
        let name = BenchmarkId::from_parameter(format!("{num_plans} plans, {num_layers} layers"));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let sweep = SweepPlan::new(
                    black_box(&plans),
                    black_box(&example),
                    num_plans.div_ceil(40),
                    num_layers,
                );
                assert!(sweep.is_ok());
                sweep
            });
        });
    }
    group.finish();
    criterion.final_summary();
}
