//! What a tree has found.

use std::cmp::Ordering;

use crate::config::SearchConfig;
use crate::evaluation::{value, Evaluation};
use crate::plan::{depth, visits};

/// An evaluated plan.
#[derive(Debug, Clone, PartialEq)]
pub struct BestPlan {
    /// One action for each layer.
    pub plan: Vec<u8>,
    /// As told.
    pub reward: f64,
    /// reward - `depth_penalty` * depth.
    pub value: f64,
    /// Visits as a fraction of the number of layers.
    pub depth: f64,
    /// Layer executions.
    pub visits: u32,
}

/// All told plans of a tree, in the order in which they were chosen.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Evaluated {
    /// Plans, row after row.
    pub plans: Vec<u8>,
    /// Reward of each plan.
    pub rewards: Vec<f64>,
    /// Depth of each plan.
    pub depths: Vec<f64>,
    /// Layer executions of each plan.
    pub visits: Vec<u32>,
}

pub(crate) fn best(evaluations: &[Evaluation], config: &SearchConfig) -> Option<BestPlan> {
    admitted(evaluations, config).min_by(|a, b| {
        let by_value = b.value.total_cmp(&a.value);
        by_value
            .then_with(|| a.visits.cmp(&b.visits))
            .then_with(|| a.plan.cmp(&b.plan))
    })
}

pub(crate) fn pareto(evaluations: &[Evaluation], config: &SearchConfig) -> Vec<BestPlan> {
    let mut plans: Vec<BestPlan> = admitted(evaluations, config).collect();
    plans.sort_by(|a, b| {
        let by_reward = || b.reward.total_cmp(&a.reward);
        a.visits
            .cmp(&b.visits)
            .then_with(by_reward)
            .then_with(|| a.plan.cmp(&b.plan))
    });
    let mut front: Vec<BestPlan> = Vec::new();
    for plan in plans {
        let better = |last: &BestPlan| plan.reward.total_cmp(&last.reward) == Ordering::Greater;
        if front.last().is_none_or(better) {
            front.push(plan);
        }
    }
    front
}

pub(crate) fn evaluated(evaluations: &[Evaluation]) -> Evaluated {
    let mut told = Evaluated::default();
    for evaluation in evaluations {
        let Some(reward) = evaluation.reward else {
            continue;
        };
        told.plans.extend_from_slice(&evaluation.plan);
        told.rewards.push(reward);
        told.depths.push(depth(&evaluation.plan));
        told.visits.push(visits(&evaluation.plan));
    }
    told
}

fn admitted<'a>(
    evaluations: &'a [Evaluation],
    config: &'a SearchConfig,
) -> impl Iterator<Item = BestPlan> + 'a {
    let told = |evaluation: &'a Evaluation| evaluation.reward.map(|reward| (evaluation, reward));
    evaluations
        .iter()
        .filter(|evaluation| evaluation.admitted)
        .filter_map(told)
        .map(|(evaluation, reward)| BestPlan {
            plan: evaluation.plan.to_vec(),
            reward,
            value: value(reward, &evaluation.plan, config),
            depth: depth(&evaluation.plan),
            visits: visits(&evaluation.plan),
        })
}
