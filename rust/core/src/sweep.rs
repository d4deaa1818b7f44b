//! Sweep planner: how one pass over the layers serves many plans of many prompts.
//!
//! Plans of one prompt that agree on layers `0..l` need the same hidden state before layer `l`, so it is computed
//! once. A *state* is a distinct pair of a prompt and such a prefix. At each layer the states that some plan executes
//! or repeats get a *first* visit, those that some plan repeats get a *second* one on top, and each distinct pair of a
//! state and an action becomes a state of the next layer.

use crate::error::{Error, Result};
use crate::plan::{self, EXECUTE, REPEAT, SKIP};

/// Three blocks (states, first results, second results) must fit a 32-bit index together.
const MAX_ROWS: usize = (u32::MAX / 3) as usize;
const ABSENT: u32 = u32::MAX;

/// What to do at one layer, as row indices.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LayerStep {
    /// States that the layer visits, ascending.
    pub first: Vec<u32>,
    /// Rows of the results of `first` that the layer visits again, ascending.
    pub second: Vec<u32>,
    /// The next states, as rows of the states, the first results and the second results laid end to end; ascending,
    /// but after the last layer in the order of the plans.
    pub gather: Vec<u32>,
    /// The prompt of each next state.
    pub example: Vec<u32>,
    /// The state that each plan is in before the layer.
    pub entering: Vec<u32>,
    /// The state that each plan is in after the layer, as a row of the same three blocks as `gather`.
    pub leaving: Vec<u32>,
    /// Results that no layer visits again, as rows of the first and the second results laid end to end, ascending.
    pub settled: Vec<u32>,
}

/// One pass over the layers that yields the last hidden state of every plan.
///
/// Before layer 0 the states are the prompts, in order. After the last layer there is one row for each plan, in the
/// order given, equal plans included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SweepPlan {
    steps: Vec<LayerStep>,
    naive_visits: u64,
    executed_visits: u64,
}

impl SweepPlan {
    /// Plans a sweep.
    ///
    /// `plans` holds `example.len()` plans of `num_layers` actions, row after row; `example[i]` is the prompt of plan
    /// `i`. Prompts without a plan are dropped at layer 0.
    ///
    /// # Errors
    ///
    /// [`Error::EmptySweep`], [`Error::PlansLength`], [`Error::TooManyRows`], [`Error::UnknownExample`],
    /// [`Error::UnknownAction`] and [`Error::EmptyPlan`], each for what its name says.
    ///
    /// # Complexity
    ///
    /// Time and memory O(plans x layers), and O(prompts) once.
    ///
    /// # Examples
    ///
    /// ```
    /// // One prompt, two plans that differ in the last of three layers: 4 visits in place of 7.
    /// let sweep = dynadepth_core::SweepPlan::new(&[1, 1, 1, 1, 1, 2], &[0, 0], 1, 3)?;
    /// assert_eq!((sweep.naive_visits(), sweep.executed_visits()), (7, 4));
    /// # Ok::<(), dynadepth_core::Error>(())
    /// ```
    pub fn new(
        plans: &[u8],
        example: &[u32],
        num_examples: usize,
        num_layers: usize,
    ) -> Result<Self> {
        check_input(plans, example, num_examples, num_layers)?;
        let mut rows = Rows::new(example, num_examples);
        let last_visit: Vec<usize> = plans
            .chunks_exact(num_layers)
            .map(|plan| plan.iter().rposition(|&action| action != SKIP).unwrap_or(0))
            .collect();
        let mut steps = Vec::with_capacity(num_layers);
        let mut executed = 0_u64;
        for layer in 0..num_layers {
            let actions = || plans.iter().skip(layer).step_by(num_layers).copied();
            let visited_later = || last_visit.iter().map(|&last| last > layer);
            let step = rows.advance(actions, visited_later, layer + 1 == num_layers);
            executed += (step.first.len() + step.second.len()) as u64;
            steps.push(step);
        }
        let naive = plans.iter().map(|&action| u64::from(action)).sum();
        Ok(Self {
            steps,
            naive_visits: naive,
            executed_visits: executed,
        })
    }

    /// Layers of the model.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.steps.len()
    }

    /// Visits if every plan ran alone.
    #[must_use]
    pub fn naive_visits(&self) -> u64 {
        self.naive_visits
    }

    /// Visits of this sweep: one for each distinct prompt, prefix and visit.
    #[must_use]
    pub fn executed_visits(&self) -> u64 {
        self.executed_visits
    }

    /// What to do at a layer; `None` beyond the last one.
    #[must_use]
    pub fn step(&self, layer: usize) -> Option<&LayerStep> {
        self.steps.get(layer)
    }
}

fn check_input(
    plans: &[u8],
    example: &[u32],
    num_examples: usize,
    num_layers: usize,
) -> Result<()> {
    let num_plans = example.len();
    if num_plans == 0 || num_examples == 0 || num_layers == 0 {
        return Err(Error::EmptySweep {
            num_plans,
            num_examples,
            num_layers,
        });
    }
    if Some(plans.len()) != num_plans.checked_mul(num_layers) {
        return Err(Error::PlansLength {
            given: plans.len(),
            num_plans,
            num_layers,
        });
    }
    let most = num_plans.max(num_examples);
    if most > MAX_ROWS {
        return Err(Error::TooManyRows {
            given: most,
            limit: MAX_ROWS,
        });
    }
    for (row, (actions, &prompt)) in plans.chunks_exact(num_layers).zip(example).enumerate() {
        if prompt as usize >= num_examples {
            return Err(Error::UnknownExample {
                row,
                example: prompt,
                num_examples,
            });
        }
        plan::check(actions, row)?;
    }
    Ok(())
}

/// The states before a layer, and the one that each plan is in.
struct Rows {
    /// Prompt of each state.
    example: Vec<u32>,
    /// State of each plan.
    state: Vec<u32>,
}

impl Rows {
    fn new(example: &[u32], num_examples: usize) -> Self {
        // `check_input` has bounded both numbers, so nothing is cut off here.
        let prompts = u32::try_from(num_examples).unwrap_or(ABSENT);
        Self {
            example: (0..prompts).collect(),
            state: example.to_vec(),
        }
    }

    /// Takes one layer: `actions` yields the action of each plan there, `visited_later` whether a later layer visits it.
    fn advance<I: Iterator<Item = u8>, J: Iterator<Item = bool>>(
        &mut self,
        actions: impl Fn() -> I,
        visited_later: impl Fn() -> J,
        last: bool,
    ) -> LayerStep {
        let num_states = self.example.len();
        let mut wanted = vec![[false; 3]; num_states];
        for (&state, action) in self.state.iter().zip(actions()) {
            wanted[state as usize][usize::from(action)] = true;
        }
        let mut step = LayerStep {
            entering: self.state.clone(),
            ..LayerStep::default()
        };
        // Where the outcome of each action lies among [states, first results, second results].
        let mut source = vec![[ABSENT; 3]; num_states];
        let (mut row, mut num_first) = (0_u32, 0_u32);
        for (wants, places) in wanted.iter().zip(&mut source) {
            places[usize::from(SKIP)] = row;
            if wants[usize::from(EXECUTE)] || wants[usize::from(REPEAT)] {
                places[usize::from(EXECUTE)] = num_first;
                step.first.push(row);
                num_first += 1;
            }
            row += 1;
        }
        let (first_start, second_start) = (row, row + num_first);
        let mut num_second = 0_u32;
        for (wants, places) in wanted.iter().zip(&mut source) {
            if wants[usize::from(REPEAT)] {
                places[usize::from(REPEAT)] = second_start + num_second;
                step.second.push(places[usize::from(EXECUTE)]);
                num_second += 1;
            }
            if places[usize::from(EXECUTE)] != ABSENT {
                places[usize::from(EXECUTE)] += first_start;
            }
        }
        step.leaving = (self.state.iter().zip(actions()))
            .map(|(&state, action)| source[state as usize][usize::from(action)])
            .collect();
        let mut alive = vec![false; (num_first + num_second) as usize];
        for &row in &step.second {
            alive[row as usize] = true;
        }
        for (&row, later) in step.leaving.iter().zip(visited_later()) {
            if later && row >= first_start {
                alive[(row - first_start) as usize] = true;
            }
        }
        step.settled = (0..num_first + num_second)
            .filter(|&row| !alive[row as usize])
            .collect();
        if last {
            step.gather.clone_from(&step.leaving);
            step.example = (self.state.iter())
                .map(|&state| self.example[state as usize])
                .collect();
            return step;
        }
        let mut next = vec![[ABSENT; 3]; num_states];
        let mut num_next = 0_u32;
        for action in [SKIP, EXECUTE, REPEAT].map(usize::from) {
            for (state, wants) in wanted.iter().enumerate() {
                if wants[action] {
                    next[state][action] = num_next;
                    num_next += 1;
                    step.gather.push(source[state][action]);
                    step.example.push(self.example[state]);
                }
            }
        }
        for (state, action) in self.state.iter_mut().zip(actions()) {
            *state = next[*state as usize][usize::from(action)];
        }
        self.example.clone_from(&step.example);
        step
    }
}
