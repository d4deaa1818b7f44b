//! Plans that a tree has chosen, and what they are worth.

use crate::config::SearchConfig;
use crate::plan;

/// A plan that was chosen, and its reward once told.
#[derive(Debug, Clone)]
pub(crate) struct Evaluation {
    pub(crate) plan: Box<[u8]>,
    /// Edits from the root, in the order of the descent; `None` if the plan is outside the graph.
    pub(crate) path: Option<Vec<usize>>,
    pub(crate) reward: Option<f64>,
    /// Whether the plan keeps the caps; the probe goes beyond them.
    pub(crate) admitted: bool,
    /// Whether the climber was told of the plan when it was chosen.
    pub(crate) noted: bool,
}

/// What the search maximises: reward - `depth_penalty` * depth.
pub(crate) fn value(reward: f64, plan: &[u8], config: &SearchConfig) -> f64 {
    reward - config.depth_penalty * plan::depth(plan)
}
