//! A planned sweep, carried out on symbols, gives every plan its own visits and shares all that can be shared.

use std::collections::BTreeSet;

use dynadepth_core::{Error, Result, SweepPlan};
use proptest::prelude::*;

/// A hidden state as the list of what made it: its prompt and the layers visited.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Symbol {
    example: u32,
    visits: Vec<usize>,
}

impl Symbol {
    fn visited(&self, layer: usize) -> Self {
        let mut visits = self.visits.clone();
        visits.push(layer);
        Self {
            example: self.example,
            visits,
        }
    }
}

/// Carries a sweep out; returns the states before each layer and after the last, and how many visits that took.
fn carry_out(sweep: &SweepPlan, num_examples: u32) -> (Vec<Vec<Symbol>>, u64) {
    let mut states: Vec<Symbol> = (0..num_examples)
        .map(|example| Symbol {
            example,
            visits: Vec::new(),
        })
        .collect();
    let mut executed = 0;
    let mut history = Vec::new();
    for layer in 0..sweep.num_layers() {
        let step = sweep.step(layer).cloned().unwrap_or_default();
        let visit = |from: &[Symbol], rows: &[u32]| -> Vec<Symbol> {
            rows.iter()
                .map(|&row| from[row as usize].visited(layer))
                .collect()
        };
        let first = visit(&states, &step.first);
        let second = visit(&first, &step.second);
        executed += (first.len() + second.len()) as u64;
        let all: Vec<Symbol> = [states.as_slice(), &first, &second].concat();
        history.push(states);
        states = step
            .gather
            .iter()
            .map(|&row| all[row as usize].clone())
            .collect();
        let examples: Vec<u32> = states.iter().map(|state| state.example).collect();
        assert_eq!(examples, step.example);
    }
    history.push(states);
    (history, executed)
}

/// Carries a sweep out; returns the last states, and how many visits that took.
fn execute(sweep: &SweepPlan, num_examples: u32) -> (Vec<Symbol>, u64) {
    let (mut history, executed) = carry_out(sweep, num_examples);
    (history.pop().unwrap_or_default(), executed)
}

fn symbol(plan: &[u8], example: u32) -> Symbol {
    let visits = plan
        .iter()
        .enumerate()
        .flat_map(|(layer, &action)| vec![layer; action as usize]);
    Symbol {
        example,
        visits: visits.collect(),
    }
}

/// Plans of `num_layers` layers, not empty, with their prompts.
fn batches() -> impl Strategy<Value = (usize, u32, Vec<u8>, Vec<u32>)> {
    (1_usize..8, 1_u32..5, 1_usize..40).prop_flat_map(|(num_layers, num_examples, num_plans)| {
        let plan = prop::collection::vec(0_u8..3, num_layers).prop_map(|mut plan| {
            if plan.iter().all(|&action| action == 0) {
                plan[0] = 1;
            }
            plan
        });
        let plans = prop::collection::vec(plan, num_plans).prop_map(|plans| plans.concat());
        let example = prop::collection::vec(0..num_examples, num_plans);
        (Just(num_layers), Just(num_examples), plans, example)
    })
}

fn planned(
    plans: &[u8],
    example: &[u32],
    num_examples: u32,
    num_layers: usize,
) -> Result<SweepPlan> {
    SweepPlan::new(plans, example, num_examples as usize, num_layers)
}

proptest! {
    #[test]
    fn every_plan_gets_its_own_visits((num_layers, num_examples, plans, example) in batches()) {
        let sweep = planned(&plans, &example, num_examples, num_layers)
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
        let (states, executed) = execute(&sweep, num_examples);
        let expected: Vec<Symbol> = plans
            .chunks(num_layers)
            .zip(&example)
            .map(|(plan, &example)| symbol(plan, example))
            .collect();
        prop_assert_eq!(states, expected);
        prop_assert_eq!(executed, sweep.executed_visits());
    }

    #[test]
    fn nothing_is_computed_twice((num_layers, num_examples, plans, example) in batches()) {
        let sweep = planned(&plans, &example, num_examples, num_layers)
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
        // A visit is named by its prompt, what ran before it, and its layer; a layer skipped leaves no trace, but the
        // place of a visit does: plans that reach a state over different layers are kept apart by `plan[..layer]`.
        let mut distinct = BTreeSet::new();
        for (plan, &prompt) in plans.chunks(num_layers).zip(&example) {
            for (layer, &action) in plan.iter().enumerate() {
                for time in 0..action {
                    distinct.insert((prompt, plan[..layer].to_vec(), time));
                }
            }
        }
        prop_assert_eq!(sweep.executed_visits(), distinct.len() as u64);
        let naive: u64 = plans.iter().map(|&action| u64::from(action)).sum();
        prop_assert_eq!(sweep.naive_visits(), naive);
        prop_assert!(sweep.executed_visits() <= naive);
    }

    #[test]
    fn rows_to_visit_ascend_and_are_distinct((num_layers, num_examples, plans, example) in batches()) {
        let sweep = planned(&plans, &example, num_examples, num_layers)
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
        for layer in 0..num_layers {
            let step = sweep.step(layer).cloned().unwrap_or_default();
            prop_assert!(step.first.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(step.second.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert_eq!(step.gather.len(), step.example.len());
            // The next states lie as their sources do, so that they need no shuffling; the last ones as their plans do.
            let ascending = step.gather.windows(2).all(|pair| pair[0] < pair[1]);
            prop_assert!(ascending || layer + 1 == num_layers);
        }
        prop_assert_eq!(sweep.step(num_layers), None);
    }

    #[test]
    fn plans_enter_each_layer_in_their_own_state((num_layers, num_examples, plans, example) in batches()) {
        let sweep = planned(&plans, &example, num_examples, num_layers)
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
        let (history, _) = carry_out(&sweep, num_examples);
        for (layer, states) in history.iter().take(num_layers).enumerate() {
            let step = sweep.step(layer).cloned().unwrap_or_default();
            let prefixes: Vec<(u32, &[u8])> = plans
                .chunks(num_layers)
                .zip(&example)
                .map(|(plan, &prompt)| (prompt, &plan[..layer]))
                .collect();
            let entered: Vec<Symbol> =
                step.entering.iter().map(|&row| states[row as usize].clone()).collect();
            let expected: Vec<Symbol> =
                prefixes.iter().map(|&(prompt, prefix)| symbol(prefix, prompt)).collect();
            prop_assert_eq!(entered, expected);
            // One row for each distinct prefix of a prompt: layers skipped count, although they leave no trace.
            let distinct: BTreeSet<_> = prefixes.iter().collect();
            let rows: BTreeSet<_> = step.entering.iter().collect();
            let pairs: BTreeSet<_> = prefixes.iter().zip(&step.entering).collect();
            prop_assert_eq!((rows.len(), pairs.len()), (distinct.len(), distinct.len()));
        }
    }

    #[test]
    fn results_are_settled_when_no_later_visit_reads_them((num_layers, num_examples, plans, example) in batches()) {
        let sweep = planned(&plans, &example, num_examples, num_layers)
            .map_err(|error| TestCaseError::fail(error.to_string()))?;
        let (history, _) = carry_out(&sweep, num_examples);
        for layer in 0..num_layers {
            let step = sweep.step(layer).cloned().unwrap_or_default();
            let (states, num_first) = (history[layer].len(), step.first.len());
            // Read again: results repeated here, and those of plans that visit a later layer.
            let mut read: BTreeSet<usize> = step.second.iter().map(|&row| row as usize).collect();
            for (plan, &row) in plans.chunks(num_layers).zip(&step.leaving) {
                let row = row as usize;
                if row >= states && plan[layer + 1..].iter().any(|&action| action > 0) {
                    read.insert(row - states);
                }
            }
            let settled: Vec<usize> = (0..num_first + step.second.len())
                .filter(|row| !read.contains(row))
                .collect();
            let given: Vec<usize> = step.settled.iter().map(|&row| row as usize).collect();
            prop_assert_eq!(&given, &settled);
            // Where a plan leaves to is what it enters the next layer as.
            let next = sweep.step(layer + 1);
            for (plan, &row) in step.leaving.iter().enumerate() {
                let entered = next.map_or(plan, |next| next.entering[plan] as usize);
                prop_assert_eq!(step.gather[entered], row);
            }
        }
    }
}

#[test]
fn plans_enter_where_the_prompts_and_their_prefixes_are() -> Result<()> {
    // Prompt 0 has no plan; plans of prompt 1 part at layer 0, the third one is of prompt 2.
    let sweep = planned(&[1, 1, 1, 0, 1, 2, 1, 1, 1, 1, 2, 1], &[1, 1, 2, 1], 3, 3)?;
    let entering = |layer| sweep.step(layer).map(|step| step.entering.clone());
    assert_eq!(entering(0), Some(vec![1, 1, 2, 1]));
    // What was skipped comes first, then what was executed, then what was repeated.
    assert_eq!(entering(1), Some(vec![1, 0, 2, 1]));
    assert_eq!(entering(2), Some(vec![1, 0, 2, 3]));
    assert_eq!(entering(3), None);
    Ok(())
}

#[test]
fn execute_and_repeat_share_the_first_visit() -> Result<()> {
    let sweep = planned(&[1, 2], &[0, 0], 1, 1)?;
    let step = sweep.step(0).cloned().unwrap_or_default();
    assert_eq!(
        (step.first, step.second, step.gather),
        (vec![0], vec![0], vec![1, 2])
    );
    assert_eq!(sweep.executed_visits(), 2);
    Ok(())
}

#[test]
fn equal_plans_come_out_each_in_its_row() -> Result<()> {
    let sweep = planned(&[1, 0, 1, 0, 0, 1], &[1, 1, 0], 2, 2)?;
    let last = sweep.step(1).cloned().unwrap_or_default();
    assert_eq!(last.example, [1, 1, 0]);
    assert_eq!(last.gather[0], last.gather[1]);
    assert_eq!(sweep.executed_visits(), 2);
    Ok(())
}

#[test]
fn bad_input_is_named() {
    let error = |plans: &[u8], example: &[u32], num_examples, num_layers| {
        SweepPlan::new(plans, example, num_examples, num_layers).err()
    };
    let empty = |num_plans, num_examples, num_layers| {
        Some(Error::EmptySweep {
            num_plans,
            num_examples,
            num_layers,
        })
    };
    assert_eq!(error(&[], &[], 1, 2), empty(0, 1, 2));
    assert_eq!(error(&[1], &[0], 0, 1), empty(1, 0, 1));
    assert_eq!(error(&[], &[0], 1, 0), empty(1, 1, 0));
    let length = Error::PlansLength {
        given: 3,
        num_plans: 2,
        num_layers: 2,
    };
    assert_eq!(error(&[1, 1, 1], &[0, 0], 1, 2), Some(length));
    let prompt = Error::UnknownExample {
        row: 1,
        example: 2,
        num_examples: 2,
    };
    assert_eq!(error(&[1, 1], &[0, 2], 2, 1), Some(prompt));
    let action = Error::UnknownAction {
        row: 0,
        layer: 1,
        action: 3,
    };
    assert_eq!(error(&[1, 3], &[0], 1, 2), Some(action));
    assert_eq!(
        error(&[1, 0], &[0, 0], 1, 1),
        Some(Error::EmptyPlan {
            row: 1,
            num_layers: 1
        })
    );
    let rows = Error::TooManyRows {
        given: usize::MAX,
        limit: (u32::MAX / 3) as usize,
    };
    assert_eq!(error(&[1], &[0], usize::MAX, 1), Some(rows));
}
