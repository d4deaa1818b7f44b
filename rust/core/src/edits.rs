//! Edits over the identity plan: which of them a plan may still take, and what is believed of each before a search.
//!
//! Edit `l` skips layer `l`; edit `num_layers + l` repeats it. A plan is a set of edits, at most one for each layer.

use crate::config::{SearchConfig, Selection};
use crate::plan::{EXECUTE, REPEAT, SKIP};
use crate::prior::EditPrior;

/// The prior probability of an edit never falls below this share of the best one's.
const LEAST_WEIGHT: f64 = 1e-9;
/// How many prompts the mean variance counts for, against those that measured an edit's own.
const PROMPTS_SHRUNK_BY: f64 = 4.0;

/// Returns the layer of an edit and the action it puts there.
pub(crate) fn target(edit: usize, num_layers: usize) -> (usize, u8) {
    if edit < num_layers {
        (edit, SKIP)
    } else {
        (edit - num_layers, REPEAT)
    }
}

/// Returns the edit that puts an action at a layer; `None` for EXECUTE.
pub(crate) fn edit_of(layer: usize, action: u8, num_layers: usize) -> Option<usize> {
    match action {
        SKIP => Some(layer),
        REPEAT => Some(num_layers + layer),
        _ => None,
    }
}

/// Returns the edits of a plan, ascending: its skips, then its repeats.
pub(crate) fn edits_of(plan: &[u8]) -> Vec<usize> {
    let with = |action: u8| (0..plan.len()).filter(move |&layer| plan[layer] == action);
    with(SKIP)
        .chain(with(REPEAT).map(|layer| plan.len() + layer))
        .collect()
}

/// How much of each cap a plan uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) visits: u32,
    pub(crate) repeats: u32,
    pub(crate) edits: u32,
}

impl Usage {
    pub(crate) fn of(plan: &[u8]) -> Self {
        let mut usage = Self {
            visits: 0,
            repeats: 0,
            edits: 0,
        };
        for &action in plan {
            usage.visits += u32::from(action);
            usage.repeats += u32::from(action == REPEAT);
            usage.edits += u32::from(action != EXECUTE);
        }
        usage
    }
}

/// The caps on plans. An edit is legal if the plan it leads to keeps them all, so no other plan is ever reached.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    num_layers: usize,
    max_visits: u32,
    max_repeats: u32,
    max_edits: u32,
    free: Vec<bool>,
}

impl Limits {
    /// `config` has been checked against `num_layers`.
    pub(crate) fn new(num_layers: usize, config: &SearchConfig) -> Self {
        let mut free = vec![true; num_layers];
        for &layer in &config.protect {
            free[layer as usize] = false;
        }
        Self {
            num_layers,
            max_visits: visits_within(config.max_depth, num_layers),
            max_repeats: config.max_repeats,
            max_edits: config.max_edits,
            free,
        }
    }

    pub(crate) fn num_edits(&self) -> usize {
        2 * self.num_layers
    }

    /// Whether a legal plan may take an edit and stay legal.
    pub(crate) fn allows(&self, plan: &[u8], usage: Usage, edit: usize) -> bool {
        let (layer, action) = target(edit, self.num_layers);
        let fits = if action == SKIP {
            usage.visits > 1
        } else {
            usage.visits < self.max_visits && usage.repeats < self.max_repeats
        };
        fits && plan[layer] == EXECUTE && self.free[layer] && usage.edits < self.max_edits
    }

    /// Whether some legal plan contains an edit: skips come first, which makes room for repeats under any depth cap.
    pub(crate) fn reaches(&self, edit: usize) -> bool {
        let (layer, action) = target(edit, self.num_layers);
        if !self.free[layer] || self.max_edits == 0 {
            return false;
        }
        if action == SKIP {
            return self.num_layers > 1;
        }
        let one_skip = self.max_edits > 1 && self.free.iter().filter(|&&free| free).count() > 1;
        let roomy = self.max_visits as usize > self.num_layers;
        self.max_repeats > 0 && (roomy || one_skip)
    }

    /// Whether a plan keeps all the caps.
    pub(crate) fn admits(&self, plan: &[u8]) -> bool {
        let usage = Usage::of(plan);
        (1..=self.max_visits).contains(&usage.visits)
            && usage.repeats <= self.max_repeats
            && usage.edits <= self.max_edits
            && plan
                .iter()
                .zip(&self.free)
                .all(|(&action, &free)| free || action == EXECUTE)
    }
}

/// Visits that a depth allows; the margin forgives a product such as 1.1 * 10 that rounds down.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss
)] // 1 <= max_depth <= 2 and num_layers <= MAX_LAYERS, both checked
fn visits_within(max_depth: f64, num_layers: usize) -> u32 {
    (max_depth * num_layers as f64 + 1e-9).floor() as u32
}

/// What is believed of each edit before a search: its effect on the signal, and its weight among the children.
///
/// The *signal* is what a descent goes by: the reward under [`Selection::DrLlm`], which subtracts the depth by itself,
/// and the value under the other rules.
#[derive(Debug, Clone)]
pub(crate) struct Guide {
    /// Mean change of the signal by each edit.
    pub(crate) effect: Vec<f64>,
    /// Weight of each edit, in (0, 1]: exp((effect - best effect) / (temperature * spread)).
    pub(crate) weight: Vec<f64>,
    /// Spread of the effects: the unit of the exploration bonus before a tree has seen its own.
    pub(crate) spread: f64,
    /// Variance of each effect over prompts, in units of the mean one; 1 where it is not known.
    pub(crate) variance: Vec<f64>,
    /// The mean variance of an effect, in squared units of reward; the squared spread if it is not known.
    pub(crate) scale: f64,
    /// Whether there is a prior.
    pub(crate) measured: bool,
}

impl Guide {
    /// `prior` measures every edit that `limits` can reach; without one all edits are alike but for their depth.
    pub(crate) fn new(limits: &Limits, config: &SearchConfig, prior: Option<&EditPrior>) -> Self {
        let num_layers = limits.num_layers;
        let step = match config.selection {
            Selection::Posterior | Selection::Puct => depth_step(config, num_layers),
            Selection::DrLlm => 0.0,
        };
        let reachable: Vec<usize> = (0..limits.num_edits())
            .filter(|&edit| limits.reaches(edit))
            .collect();
        let mut effect = vec![0.0; limits.num_edits()];
        for &edit in &reachable {
            let mean = prior.map_or(0.0, |prior| prior.mean[edit]);
            effect[edit] = if edit < num_layers {
                mean + step
            } else {
                mean - step
            };
        }
        let mut sizes: Vec<f64> = reachable.iter().map(|&edit| effect[edit].abs()).collect();
        sizes.sort_by(f64::total_cmp);
        let spread = positive_median(&sizes).unwrap_or(1.0);
        let best = reachable
            .iter()
            .map(|&edit| effect[edit])
            .fold(f64::NEG_INFINITY, f64::max);
        let mut weight = vec![LEAST_WEIGHT; limits.num_edits()];
        for &edit in &reachable {
            let scaled = (effect[edit] - best) / (config.temperature * spread);
            weight[edit] = scaled.exp().max(LEAST_WEIGHT);
        }
        let (variance, mean_variance) = prior
            .and_then(|prior| variances(prior, &reachable))
            .unwrap_or_else(|| (vec![1.0; limits.num_edits()], spread * spread));
        Self {
            effect,
            weight,
            spread,
            variance,
            scale: mean_variance,
            measured: prior.is_some(),
        }
    }
}

/// Returns the variance of each edit's effect in units of their mean, shrunk towards it since few prompts measured it,
/// and the mean; `None` if none varies. What one prompt's effect may be includes what its mean is not known by.
fn variances(prior: &EditPrior, reachable: &[usize]) -> Option<(Vec<f64>, f64)> {
    let count = f64::from(prior.count.max(1));
    let mut total = 0.0;
    for &edit in reachable {
        total += prior.variance[edit];
    }
    #[allow(clippy::cast_precision_loss)] // at most 2 * MAX_LAYERS
    let mean = total / reachable.len().max(1) as f64;
    if mean <= 0.0 {
        return None;
    }
    let mut variance = vec![1.0; prior.variance.len()];
    for &edit in reachable {
        variance[edit] =
            (count * prior.variance[edit] / mean + PROMPTS_SHRUNK_BY) / (count + PROMPTS_SHRUNK_BY);
    }
    Some((variance, mean * (1.0 + 1.0 / count)))
}

/// What one visit costs, in units of reward.
#[allow(clippy::cast_precision_loss)] // num_layers <= MAX_LAYERS
pub(crate) fn depth_step(config: &SearchConfig, num_layers: usize) -> f64 {
    config.depth_penalty / num_layers as f64
}

/// The upper median of ascending numbers, if it is positive.
pub(crate) fn positive_median(ascending: &[f64]) -> Option<f64> {
    ascending
        .get(ascending.len() / 2)
        .copied()
        .filter(|&median| median > 0.0)
}
