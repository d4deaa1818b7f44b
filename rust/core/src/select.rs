//! The two rules that score a child during a descent.
//!
//! All arithmetic is f64, in the order written, so that the plain-Python reference agrees to the last bit.

use crate::config::{SearchConfig, Selection};

/// What a rule sees of the node that a descent stands on.
pub(crate) struct ParentView {
    /// Descents through the node, open ones included.
    pub(crate) visits: u32,
    /// Unit of the exploration bonus and of the virtual loss.
    pub(crate) unit: f64,
}

/// What a rule sees of a child.
pub(crate) struct ChildView {
    /// Mean signal below the child; its estimate if nothing below it has been told.
    pub(crate) mean: f64,
    /// Told descents through the child, from any parent.
    pub(crate) count: u32,
    /// Open descents through the child, from any parent.
    pub(crate) open: u32,
    /// Descents along this edge, told and open.
    pub(crate) edge_visits: u32,
    /// Whether the child's plan has never been asked.
    pub(crate) fresh: bool,
    /// Prior probability among its siblings.
    pub(crate) probability: f64,
    /// Depth of the child's plan.
    pub(crate) depth: f64,
}

/// A score, and what decides between equal scores; larger is better. Equal pairs leave it to the lowest edit.
pub(crate) type Score = (f64, f64);

/// Scores a child by the rule of the settings.
pub(crate) fn score(config: &SearchConfig, parent: &ParentView, child: &ChildView) -> Score {
    match config.selection {
        // A descent by the posterior scores children by itself.
        Selection::Puct | Selection::Posterior => (puct(config, parent, child), 0.0),
        Selection::DrLlm => drllm(config, parent, child),
    }
}

/// Q + c * unit * P * sqrt(N) / (1 + n).
fn puct(config: &SearchConfig, parent: &ParentView, child: &ChildView) -> f64 {
    let bonus =
        config.exploration * parent.unit * child.probability * f64::from(parent.visits).sqrt()
            / f64::from(1 + child.edge_visits);
    expected(config, parent, child) + bonus
}

/// Q/v + c * sqrt(ln V / v) - lambda * depth; a fresh child comes first, the one of the best estimate before others.
fn drllm(config: &SearchConfig, parent: &ParentView, child: &ChildView) -> Score {
    let cost = config.depth_penalty * child.depth;
    if child.fresh {
        return (f64::INFINITY, child.mean - cost);
    }
    let visits = f64::from(child.edge_visits.max(1));
    let bonus = config.exploration * (f64::from(parent.visits).ln() / visits).sqrt();
    (expected(config, parent, child) + bonus - cost, 0.0)
}

/// The mean below a child, each open descent counted as one that ends `virtual_loss` units below it.
fn expected(config: &SearchConfig, parent: &ParentView, child: &ChildView) -> f64 {
    if child.open == 0 {
        return child.mean;
    }
    let share = f64::from(child.open) / f64::from(child.count + child.open);
    child.mean - config.virtual_loss * parent.unit * share
}
