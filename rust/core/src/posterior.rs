//! What a tree believes of its plans: a Gaussian posterior over edits and pairs of edits, given the rewards told.
//!
//! The gain of a plan over the identity is the sum of its edits' effects, of an interaction of each pair of its edits,
//! and of noise, all Gaussian. The prior gives the effects' means and variances; skips share an unknown offset, and so
//! do repeats. The mean of the posterior is exact (a Gaussian process over plans, its Cholesky factor grown by a row
//! for each plan). Its variance is that of a linear model, in which the interactions of a plan are noise: that is
//! cheap for all the children of a plan at once.
//!
//! Variances are in units of the mean prior variance of an effect; `scale` turns them into squared rewards.

use crate::edits::{edits_of, Guide};

/// Plans that a posterior learns from; later ones are not, since a label is long found by then.
const MOST_POINTS: usize = 512;
/// How many plans the prior's scale counts for, against the scale of the gains told.
const SCALE_WEIGHT: f64 = 4.0;
/// Variance of the common offset of skips, and of repeats, if there is a prior; without one it is 1.
const OFFSET: f64 = 0.05;

/// A plan other than the identity that has been asked.
#[derive(Debug, Clone)]
struct Point {
    /// Ascending.
    edits: Vec<usize>,
    skips: f64,
    repeats: f64,
}

impl Point {
    fn new(plan: &[u8]) -> Self {
        let edits = edits_of(plan);
        let skips = edits.iter().filter(|&&edit| edit < plan.len()).count();
        Self {
            skips: number(skips),
            repeats: number(edits.len() - skips),
            edits,
        }
    }
}

/// The posterior of one tree.
#[derive(Debug, Clone)]
pub(crate) struct Posterior {
    num_layers: usize,
    interaction: f64,
    noise: f64,
    offset: f64,
    points: Vec<Point>,
    /// Points that contain each edit, ascending.
    containing: Vec<Vec<usize>>,
    /// Cholesky factor of the points' covariance, its rows one after the other.
    factor: Vec<f64>,
    /// The told residuals divided by the factor; as long as the told points.
    forward: Vec<f64>,
    /// The told residuals divided by the covariance.
    weights: Vec<f64>,
    /// Sum of the weights times the points' numbers of skips, and of repeats.
    offsets: [f64; 2],
    /// Covariance of the effects in the linear model, row after row.
    covariance: Vec<f64>,
    /// Squared rewards of a unit of variance.
    scale: f64,
}

/// What is believed of a plan and of each plan with one edit more.
#[derive(Debug, Clone)]
pub(crate) struct Belief {
    /// Expected gain over the identity.
    pub(crate) mean: f64,
    /// Variance of the gain, in units of the prior's.
    variance: f64,
    /// Edits that the plan shares with each point.
    shared: Vec<f64>,
    /// Covariance of the plan's gain with each effect.
    towards: Vec<f64>,
}

impl Posterior {
    pub(crate) fn new(guide: &Guide, interaction: f64, noise: f64) -> Self {
        let num_edits = guide.effect.len();
        let num_layers = num_edits / 2;
        let offset = if guide.measured { OFFSET } else { 1.0 };
        let mut covariance = vec![0.0; num_edits * num_edits];
        for row in 0..num_edits {
            for column in 0..num_edits {
                if (row < num_layers) == (column < num_layers) {
                    covariance[row * num_edits + column] = offset;
                }
            }
            covariance[row * num_edits + row] += guide.variance[row];
        }
        Self {
            num_layers,
            interaction,
            noise,
            offset,
            points: Vec::new(),
            containing: vec![Vec::new(); num_edits],
            factor: Vec::new(),
            forward: Vec::new(),
            weights: Vec::new(),
            offsets: [0.0; 2],
            covariance,
            scale: guide.scale,
        }
    }

    /// Adds a plan that has been asked; until it is told, it makes its neighbours more certain and moves no mean.
    pub(crate) fn add(&mut self, plan: &[u8], guide: &Guide) {
        if self.points.len() == MOST_POINTS {
            return;
        }
        let point = Point::new(plan);
        if point.edits.is_empty() {
            return;
        }
        self.grow_factor(&point, guide);
        self.shrink_covariance(&point);
        for &edit in &point.edits {
            self.containing[edit].push(self.points.len());
        }
        self.points.push(point);
    }

    /// Learns the gains of the points added and not told yet, in their order.
    pub(crate) fn tell(&mut self, gains: impl Iterator<Item = f64>, guide: &Guide) {
        for gain in gains {
            let index = self.forward.len();
            if index == self.points.len() {
                break;
            }
            let mut residual = gain;
            for &edit in &self.points[index].edits {
                residual -= guide.effect[edit];
            }
            let row = &self.factor[start(index)..];
            for (entry, known) in row.iter().zip(&self.forward) {
                residual -= entry * known;
            }
            self.forward.push(residual / row[index]);
        }
        self.solve();
        let mut squares = 0.0;
        for entry in &self.forward {
            squares += entry * entry;
        }
        let count = number(self.forward.len());
        let prior = if guide.measured { SCALE_WEIGHT } else { 0.0 };
        if prior + count > 0.0 {
            self.scale = (prior * guide.scale + squares) / (prior + count);
        }
    }

    /// Log of how likely the told gains are under these variances, but for a constant; the scale is integrated out.
    pub(crate) fn evidence(&self, guide: &Guide) -> f64 {
        let prior = if guide.measured { SCALE_WEIGHT } else { 0.0 };
        let freedom = prior + number(self.forward.len());
        if self.forward.is_empty() || self.scale <= 0.0 {
            return 0.0;
        }
        let mut evidence = -0.5 * freedom * (self.scale * freedom).ln();
        for index in 0..self.forward.len() {
            evidence -= self.factor[start(index) + index].ln();
        }
        evidence
    }

    /// What is believed of the identity plan.
    pub(crate) fn identity(&self) -> Belief {
        Belief {
            mean: 0.0,
            variance: 0.0,
            shared: vec![0.0; self.points.len()],
            towards: vec![0.0; self.containing.len()],
        }
    }

    /// Expected gain of a plan, and its standard deviation.
    pub(crate) fn belief(&self, belief: &Belief) -> (f64, f64) {
        (belief.mean, (belief.variance.max(0.0) * self.scale).sqrt())
    }

    /// Expected gain of a plan with one edit more, and its standard deviation.
    pub(crate) fn child(&self, belief: &Belief, edit: usize, guide: &Guide) -> (f64, f64) {
        let mut mean = belief.mean + guide.effect[edit];
        mean += self.offset * self.offsets[usize::from(edit >= self.num_layers)];
        for &point in &self.containing[edit] {
            let Some(weight) = self.weights.get(point) else {
                break;
            };
            mean += weight * (guide.variance[edit] + self.interaction * belief.shared[point]);
        }
        let own = self.covariance[edit * self.containing.len() + edit];
        let variance = belief.variance + 2.0 * belief.towards[edit] + own;
        (mean, (variance.max(0.0) * self.scale).sqrt())
    }

    /// Goes from a plan to the plan with one edit more.
    pub(crate) fn step(&self, belief: &mut Belief, edit: usize, guide: &Guide) {
        belief.mean = self.child(belief, edit, guide).0;
        let num_edits = self.containing.len();
        let own = self.covariance[edit * num_edits + edit];
        belief.variance = belief.variance + 2.0 * belief.towards[edit] + own;
        for (other, towards) in belief.towards.iter_mut().enumerate() {
            *towards += self.covariance[edit * num_edits + other];
        }
        for &point in &self.containing[edit] {
            belief.shared[point] += 1.0;
        }
    }

    /// Appends a row to the Cholesky factor.
    fn grow_factor(&mut self, point: &Point, guide: &Guide) {
        let size = self.points.len();
        let mut row = Vec::with_capacity(size + 1);
        for (index, other) in self.points.iter().enumerate() {
            let mut entry = self.covariance_of(point, other, guide);
            let above = &self.factor[start(index)..];
            for (left, right) in row.iter().zip(above) {
                entry -= left * right;
            }
            row.push(entry / above[index]);
        }
        let mut own = self.covariance_of(point, point, guide) + self.noise;
        for entry in &row {
            own -= entry * entry;
        }
        // The noise bounds it from below, but for rounding.
        row.push(own.max(self.noise).sqrt());
        self.factor.extend_from_slice(&row);
    }

    /// Covariance of two told gains; both contain the noise of the identity's reward.
    fn covariance_of(&self, left: &Point, right: &Point, guide: &Guide) -> f64 {
        let mut alike = 0.0;
        let mut total = 0.0;
        for edit in &left.edits {
            if right.edits.binary_search(edit).is_ok() {
                alike += 1.0;
                total += guide.variance[*edit];
            }
        }
        total += self.interaction * (alike * (alike - 1.0) / 2.0);
        total += self.offset * (left.skips * right.skips + left.repeats * right.repeats);
        total + self.noise
    }

    /// Learns in the linear model that a plan is asked: a variance does not depend on what is told.
    fn shrink_covariance(&mut self, point: &Point) {
        let num_edits = self.containing.len();
        let mut towards = vec![0.0; num_edits];
        for &edit in &point.edits {
            let row = &self.covariance[edit * num_edits..(edit + 1) * num_edits];
            for (sum, entry) in towards.iter_mut().zip(row) {
                *sum += entry;
            }
        }
        let size = number(point.edits.len());
        let mut total = 2.0 * self.noise + self.interaction * (size * (size - 1.0) / 2.0);
        for &edit in &point.edits {
            total += towards[edit];
        }
        for (row, left) in towards.iter().enumerate() {
            if *left == 0.0 {
                continue;
            }
            let factor = left / total;
            let entries = &mut self.covariance[row * num_edits..(row + 1) * num_edits];
            for (entry, right) in entries.iter_mut().zip(&towards) {
                *entry -= factor * right;
            }
        }
    }

    /// Divides the forward solution by the transposed factor.
    fn solve(&mut self) {
        let told = self.forward.len();
        self.weights.clear();
        self.weights.extend_from_slice(&self.forward);
        for index in (0..told).rev() {
            let row = &self.factor[start(index)..];
            let weight = self.weights[index] / row[index];
            self.weights[index] = weight;
            for (earlier, entry) in self.weights[..index].iter_mut().zip(row) {
                *earlier -= weight * entry;
            }
        }
        self.offsets = [0.0; 2];
        for (weight, point) in self.weights.iter().zip(&self.points) {
            self.offsets[0] += weight * point.skips;
            self.offsets[1] += weight * point.repeats;
        }
    }
}

/// Where a row of a packed lower triangle starts.
fn start(row: usize) -> usize {
    row * (row + 1) / 2
}

#[allow(clippy::cast_precision_loss)] // counts of edits and points
fn number(count: usize) -> f64 {
    count as f64
}
