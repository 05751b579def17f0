//! What is launched for a token: at first one by one, which loads every kernel, then captured into a graph and replayed. A
//! token is computed by the step kernel or by a fixed list of separate ones, and chosen by others behind these; with a graph
//! for computing, and one for both.
//!
//! Here alone it is decided which way a token is computed, and whether in a graph.

use std::{iter, sync::Arc};

use anyhow::{Error, Result};

use super::{
    device::{Device, Graph, Launch},
    step::Step,
};
use crate::backend::{GraphReport, StepReport};

/// Launches whose arguments never change.
pub struct Region {
    device: Arc<Device>,
    /// Of what computes, and of what computes and chooses.
    states: [State; 2],
    /// The kernels that compute a token one by one.
    separate: Vec<Launch>,
    /// The one that does the same, or nearly all of it, or why there is none.
    step: Result<Step, String>,
    choosing: Vec<Launch>,
    choosing_allowed: Vec<Launch>,
    report: GraphReport,
    step_report: StepReport,
}

/// Whether there is a graph, or why not.
enum State {
    /// Nothing has run yet.
    Cold,
    /// The next run captures.
    Warm,
    Captured(Graph),
    /// Direct launches for good.
    Direct,
}

impl Region {
    /// A region that computes by the step kernel where there is one, else by separate ones. It begins without a graph and
    /// without the step kernel.
    ///
    /// # Safety
    /// Each launch must be as [`Device::launch`] asks for, with every address valid as long as the region exists.
    pub unsafe fn new(
        device: &Arc<Device>,
        separate: Vec<Launch>,
        step: Result<Step, String>,
        choosing: [Launch; 2],
        choosing_allowed: [Launch; 2],
    ) -> Self {
        Self {
            device: device.clone(),
            separate,
            step,
            choosing: choosing.into(),
            choosing_allowed: choosing_allowed.into(),
            states: [State::Direct, State::Direct],
            report: GraphReport::default(),
            step_report: StepReport::default(),
        }
    }

    /// Starts over: captured anew, or not for the reason given.
    pub fn set_graph(&mut self, disabled: Option<String>) {
        if let Some(reason) = &disabled {
            tracing::debug!("no CUDA graph: {reason}");
        }
        self.states = [(); 2].map(|()| match disabled {
            Some(_) => State::Direct,
            None => State::Cold,
        });
        self.report = GraphReport {
            enabled: disabled.is_none(),
            disabled_reason: disabled,
            ..GraphReport::default()
        };
    }

    /// Starts over with the step kernel where there is one, or without it for the reason given.
    pub fn set_step(&mut self, disabled: Option<String>) {
        let reason = disabled.or_else(|| self.step.as_ref().err().cloned());
        if let Some(reason) = &reason {
            tracing::debug!("no step kernel: {reason}");
        }
        self.step_report = StepReport {
            enabled: reason.is_none(),
            disabled_reason: reason,
        };
        self.set_graph(self.report.disabled_reason.clone());
    }

    /// The kernels that compute a token one by one.
    pub fn separate_launches(&self) -> &[Launch] {
        &self.separate
    }

    pub fn report(&self) -> &GraphReport {
        &self.report
    }

    pub fn step_report(&self) -> &StepReport {
        &self.step_report
    }

    /// What an error that the device met comes from, where that is known here.
    pub fn explain(&self, error: Error) -> Error {
        match self.step.as_ref().ok().and_then(Step::failure) {
            Some(failure) => error.context(failure),
            None => error,
        }
    }

    /// Queues what computes a token.
    pub fn run(&mut self) -> Result<()> {
        self.queue(false)
    }

    /// Queues what computes a token, and chooses the next.
    pub fn run_and_choose(&mut self) -> Result<()> {
        self.queue(true)
    }

    /// Queues what chooses the next token among those that are allowed, behind what computed its logits.
    pub fn choose_allowed(&self) -> Result<()> {
        self.launch_all(self.choosing_allowed.iter())
    }

    fn queue(&mut self, choosing: bool) -> Result<()> {
        let which = usize::from(choosing);
        if let State::Warm = self.states[which] {
            self.states[which] = self.capture(choosing);
        }
        match &self.states[which] {
            State::Captured(graph) => {
                graph.launch()?;
                self.report.replays += 1;
            }
            State::Cold => {
                self.launch_or_fall_back(choosing)?;
                self.report.direct_tokens += 1;
                let count = self.launches(choosing).count();
                tracing::debug!("warmed up: {count} kernels launched directly");
                self.states[which] = State::Warm;
            }
            State::Warm | State::Direct => {
                self.launch_or_fall_back(choosing)?;
                self.report.direct_tokens += 1;
            }
        }
        Ok(())
    }

    /// Makes a graph. Where that fails, direct launches go on.
    fn capture(&mut self, choosing: bool) -> State {
        // SAFETY: the addresses are valid as long as the region, which owns the graph.
        let captured = unsafe { Graph::capture(&self.device, || self.launch(choosing)) };
        match captured {
            Ok(graph) => {
                tracing::debug!(
                    "captured {} nodes in {:.1?}",
                    graph.nodes(),
                    graph.capture_time()
                );
                self.report.captures += 1;
                self.report.nodes = graph.nodes();
                State::Captured(graph)
            }
            Err(error) => {
                tracing::warn!(
                    "the CUDA graph could not be captured, going on with direct launches: {error:#}"
                );
                self.report.enabled = false;
                self.report.disabled_reason = Some(format!("{error:#}"));
                State::Direct
            }
        }
    }

    /// Launches directly. A step kernel that the driver refuses has done nothing, and what went before it is done again:
    /// separate kernels take their place.
    fn launch_or_fall_back(&mut self, choosing: bool) -> Result<()> {
        let Ok(step) = &self.step else {
            return self.launch(choosing);
        };
        if self.step_report.enabled {
            let Err(error) = self.launch_all(step.launches.iter()) else {
                return self.launch_all(self.launches(choosing).skip(step.launches.len()));
            };
            tracing::warn!(
                "the step kernel could not be launched, going on with separate kernels: {error:#}"
            );
            self.step_report = StepReport {
                enabled: false,
                disabled_reason: Some(format!("{error:#}")),
            };
        }
        self.launch(choosing)
    }

    fn launch(&self, choosing: bool) -> Result<()> {
        self.launch_all(self.launches(choosing))
    }

    fn launch_all<'a>(&self, mut launches: impl Iterator<Item = &'a Launch>) -> Result<()> {
        // SAFETY: as the caller of `new` vouched.
        launches.try_for_each(|launch| unsafe { self.device.launch(launch) })
    }

    /// What computes a token, and with `choosing` what chooses the next.
    fn launches(&self, choosing: bool) -> impl Iterator<Item = &Launch> {
        let computing = match &self.step {
            Ok(step) if self.step_report.enabled => &step.launches,
            _ => &self.separate,
        };
        let choosing = iter::once(&self.choosing).filter(move |_| choosing);
        computing.iter().chain(choosing.flatten())
    }
}
