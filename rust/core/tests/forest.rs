//! The forest as a caller sees it: it finds the best plan, keeps its caps, is fair, and refuses what is wrong.

mod common;

use std::collections::BTreeSet;

use common::{all_plans, finish, keeps_caps, reward, specs, tree_seed};
use dynadepth_core::{Error, Forest, ForestSpec, Result, SearchConfig, Selection};
use proptest::prelude::*;

fn fail(error: &Error) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}

fn small(num_layers: usize, num_trees: u64, config: SearchConfig) -> ForestSpec {
    ForestSpec {
        num_layers,
        config,
        seed: 1,
        tree_keys: (0..num_trees).collect(),
        prior: None,
    }
}

fn no_probe() -> SearchConfig {
    SearchConfig {
        probe_trees: 0,
        ..SearchConfig::default()
    }
}

proptest! {
    #[test]
    fn enough_evaluations_find_what_brute_force_finds(mut spec in specs()) {
        spec.config.max_evaluations = 1000;
        let mut forest = Forest::new(spec.clone()).map_err(|error| fail(&error))?;
        let asked = finish(&mut forest, 16).map_err(|error| fail(&error))?;
        let legal: BTreeSet<Vec<u8>> = all_plans(spec.num_layers)
            .into_iter()
            .filter(|plan| keeps_caps(plan, &spec.config))
            .collect();
        for (tree, &key) in spec.tree_keys.iter().enumerate() {
            let within: BTreeSet<Vec<u8>> =
                asked[tree].iter().filter(|plan| keeps_caps(plan, &spec.config)).cloned().collect();
            prop_assert_eq!(&within, &legal);
            let value = |plan: &[u8]| {
                let depth = dynadepth_core::plan::depth(plan);
                reward(tree_seed(spec.seed, key), plan) - spec.config.depth_penalty * depth
            };
            let best = legal.iter().min_by(|a, b| {
                let visits = |plan: &[u8]| dynadepth_core::plan::visits(plan);
                value(b).total_cmp(&value(a)).then(visits(a).cmp(&visits(b))).then(a.cmp(b))
            });
            let found = forest.best(tree).map_err(|error| fail(&error))?;
            prop_assert_eq!(Some(&found.plan), best);
            prop_assert_eq!(found.value.to_bits(), value(&found.plan).to_bits());
        }
    }

    #[test]
    fn plans_keep_the_caps_and_come_once(spec in specs(), max_plans in 1_usize..12) {
        let mut forest = Forest::new(spec.clone()).map_err(|error| fail(&error))?;
        let probed = spec.prior.is_none() && spec.config.probe_trees > 0;
        let asked = finish(&mut forest, max_plans).map_err(|error| fail(&error))?;
        for plans in &asked {
            let distinct: BTreeSet<&Vec<u8>> = plans.iter().collect();
            prop_assert_eq!(distinct.len(), plans.len());
            prop_assert!(plans[0].iter().all(|&action| action == 1));
            // The probe alone may go beyond a cap, and only by a lone REPEAT.
            for plan in plans.iter().filter(|plan| !keeps_caps(plan, &spec.config)) {
                let edits = plan.iter().filter(|&&action| action != 1).count();
                prop_assert!(probed && edits == 1 && plan.contains(&2));
            }
            let extra = if probed { 2 * spec.num_layers } else { 0 };
            prop_assert!(plans.len() <= spec.config.max_evaluations as usize + extra);
        }
    }

    #[test]
    fn neither_batches_nor_other_trees_change_a_tree(
        mut spec in specs(),
        max_plans in 1_usize..12,
        others in prop::collection::vec(any::<u64>(), 0..3),
    ) {
        spec.config.probe_trees = 0;
        let key = spec.tree_keys[0];
        let mut together = spec.clone();
        together.tree_keys = others.iter().copied().chain([key]).collect();
        spec.tree_keys = vec![key];
        let mut alone = Forest::new(spec).map_err(|error| fail(&error))?;
        let mut together = Forest::new(together).map_err(|error| fail(&error))?;
        let expected = finish(&mut alone, 1000).map_err(|error| fail(&error))?;
        let given = finish(&mut together, max_plans).map_err(|error| fail(&error))?;
        prop_assert_eq!(given.last(), expected.last());
    }

    #[test]
    fn stopping_early_only_ends_a_search(mut spec in specs(), stop_at in 0.1_f64..4.0, max_plans in 1_usize..12) {
        spec.config.selection = Selection::Posterior;
        let mut never = Forest::new(spec.clone()).map_err(|error| fail(&error))?;
        let expected = finish(&mut never, max_plans).map_err(|error| fail(&error))?;
        spec.config.stop_at = stop_at;
        let mut early = Forest::new(spec).map_err(|error| fail(&error))?;
        let given = finish(&mut early, max_plans).map_err(|error| fail(&error))?;
        for (tree, (given, expected)) in given.iter().zip(&expected).enumerate() {
            prop_assert!(expected.starts_with(given));
            prop_assert!(early.tree_finished(tree).map_err(|error| fail(&error))?);
        }
    }

    #[test]
    fn shares_of_a_batch_differ_by_one_at_most(max_plans in 1_usize..60, num_trees in 1_u64..9) {
        let config = SearchConfig { round_size: 8, max_evaluations: 500, ..no_probe() };
        let mut forest = Forest::new(small(12, num_trees, config)).map_err(|error| fail(&error))?;
        let identity = forest.ask(100).map_err(|error| fail(&error))?;
        let rewards = vec![0.0; identity.ticket.len()];
        forest.tell(&identity.ticket, &rewards).map_err(|error| fail(&error))?;
        let batch = forest.ask(max_plans).map_err(|error| fail(&error))?;
        let share = |tree: u64| batch.tree.iter().filter(|&&other| u64::from(other) == tree).count();
        let shares: Vec<usize> = (0..num_trees).map(share).collect();
        let (least, most) = (shares.iter().min(), shares.iter().max());
        prop_assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1), "{:?}", shares);
        prop_assert!(batch.tree.windows(2).all(|pair| pair[0] <= pair[1]));
    }
}

#[test]
fn trees_take_turns_when_a_batch_is_short() -> Result<()> {
    let mut forest = Forest::new(small(6, 5, no_probe()))?;
    let mut served = Vec::new();
    for _ in 0..3 {
        served.push(forest.ask(2)?.tree);
    }
    assert_eq!(served, [vec![0, 1], vec![2, 3], vec![4]]);
    assert!(forest.ask(2)?.ticket.is_empty());
    Ok(())
}

#[test]
fn a_repeat_comes_with_a_skip_at_full_depth() -> Result<()> {
    let config = SearchConfig {
        max_evaluations: 300,
        max_edits: 2,
        ..no_probe()
    };
    let mut forest = Forest::new(small(4, 1, config))?;
    let asked = finish(&mut forest, 50)?;
    assert!(asked[0].contains(&vec![0, 2, 1, 1]) && asked[0].contains(&vec![1, 1, 2, 0]));
    assert!(!asked[0].contains(&vec![2, 1, 1, 1]));
    Ok(())
}

#[test]
fn the_probe_asks_every_edit_and_measures_it() -> Result<()> {
    let config = SearchConfig {
        probe_trees: 2,
        max_evaluations: 1,
        ..SearchConfig::default()
    };
    let mut forest = Forest::new(small(3, 4, config))?;
    assert_eq!(forest.prior(), Err(Error::NoPrior));
    let batch = forest.ask(1000)?;
    let probed: BTreeSet<u32> = batch.tree.iter().copied().collect();
    assert_eq!((probed.len(), batch.ticket.len()), (2, 2 * 7));
    // A skip of layer 1 changes the reward by -1 and by -3, a repeat of it by nothing.
    let first = batch.tree[0];
    let rewards: Vec<f64> = batch
        .tree
        .iter()
        .zip(batch.plans.chunks(3))
        .map(|(&tree, plan)| match (plan[1], tree == first) {
            (0, true) => 4.0,
            (0, false) => 2.0,
            _ => 5.0,
        })
        .collect();
    forest.tell(&batch.ticket[1..], &rewards[1..])?;
    assert_eq!(forest.prior(), Err(Error::NoPrior));
    assert!(forest.ask(1000)?.ticket.is_empty());
    forest.tell(&batch.ticket[..1], &rewards[..1])?;
    let prior = forest.prior()?.clone();
    assert_eq!(
        (prior.mean, prior.count),
        (vec![0.0, -2.0, 0.0, 0.0, 0.0, 0.0], 2)
    );
    assert_eq!(prior.variance, [0.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
    // A lone repeat is deeper than max_depth allows, so it is evaluated but never the best.
    let tree = first as usize;
    assert_eq!(forest.evaluated(tree)?.visits, [3, 2, 2, 2, 4, 4, 4]);
    assert!(forest.pareto(tree)?.iter().all(|plan| plan.visits <= 3));
    finish(&mut forest, 10)?;
    Ok(())
}

#[test]
fn wrong_tells_change_nothing() -> Result<()> {
    let mut forest = Forest::new(small(3, 2, no_probe()))?;
    assert_eq!(forest.ask(0), Err(Error::MaxPlans));
    let batch = forest.ask(1)?;
    // All that the forest holds, to the last bit of each number.
    let before = format!("{forest:?}");
    let (good, waiting) = (batch.ticket[0], 1_u64 << 32);
    let attempts: [(&[u64], &[f64], Error); 6] = [
        (
            &[good],
            &[],
            Error::RewardsLength {
                given: 0,
                expected: 1,
            },
        ),
        (
            &[good, waiting],
            &[0.0, 0.0],
            Error::UnknownTicket { ticket: waiting },
        ),
        (&[good, 7], &[0.0, 0.0], Error::UnknownTicket { ticket: 7 }),
        (
            &[good, good],
            &[0.0, 0.0],
            Error::ReusedTicket { ticket: good },
        ),
        (
            &[good],
            &[f64::INFINITY],
            Error::BadReward {
                ticket: good,
                reward: f64::INFINITY,
            },
        ),
        (
            &[good],
            &[1e101],
            Error::BadReward {
                ticket: good,
                reward: 1e101,
            },
        ),
    ];
    for (tickets, rewards, error) in attempts {
        assert_eq!(forest.tell(tickets, rewards), Err(error));
    }
    let nan = forest.tell(&[good], &[f64::NAN]);
    assert!(matches!(nan, Err(Error::BadReward { .. })));
    assert_eq!(format!("{forest:?}"), before);
    assert_eq!(forest.best(0), Err(Error::NothingEvaluated { tree: 0 }));
    assert_eq!(
        forest.best(2),
        Err(Error::UnknownTree {
            tree: 2,
            num_trees: 2
        })
    );
    forest.tell(&[good], &[0.0])?;
    assert_eq!(
        forest.tell(&[good], &[0.0]),
        Err(Error::ReusedTicket { ticket: good })
    );
    assert_eq!(forest.best(0)?.plan, [1, 1, 1]);
    Ok(())
}

#[test]
fn what_a_forest_is_made_from_is_checked() {
    let error = |spec: ForestSpec| Forest::new(spec).err();
    assert_eq!(
        error(small(3, 0, no_probe())),
        Some(Error::NumTrees { given: 0 })
    );
    let mut spec = small(2, 1, no_probe());
    spec.prior = Some(dynadepth_core::EditPrior {
        mean: vec![0.0; 3],
        variance: vec![0.0; 3],
        count: 1,
    });
    assert_eq!(
        error(spec.clone()),
        Some(Error::PriorLength {
            given: 3,
            expected: 4
        })
    );
    let mean = vec![0.0, f64::NAN, 0.0, 0.0];
    spec.prior = Some(dynadepth_core::EditPrior {
        mean,
        variance: vec![0.0; 4],
        count: 1,
    });
    let message = error(spec.clone())
        .map(|error| error.to_string())
        .unwrap_or_default();
    assert!(
        message.contains("'skip layer 1'") && message.contains("probe again"),
        "{message}"
    );
    spec.config.protect = vec![1];
    assert_eq!(error(spec), None);
}
