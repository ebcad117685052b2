"""Metrics, comparisons and figures of energy landscapes, and planners; no model is needed.

landscapes.npz holds these arrays. C checkpoints, the baseline first; P pairs of context and goal;
K actions of a grid; M negatives; T frames of a clip, F of them without the goal; H horizons of the
planners; S pixels. An action [7] is metres, radians and gripper closedness in the robot's base
frame; an energy is the mean L1 distance between latents.

  the checkpoints
    checkpoints         [C] text            "baseline", then the ends of the adapters' paths
    training_steps      [C] int             0 for the baseline, -1 unknown
    update_norm         [C]                 ||s B A|| / ||W|| over all adapted layers; 0 means that
                                            the adapter changes nothing

    is_control          [C] int             1: trained with data.shuffle_actions

  the pairs
    episodes            [P] text            the clusters of the bootstrap
    states              [P, T, 7]           poses of the clip: metres, radians, gripper closedness
    frames              [P, 2, S, S, 3] u8  context and goal; absent with stored latents whose
                                            frames are not at hand
    frame_numbers       [P, 2] int          the recorded frames that these are; -1 unknown
    true_actions        [P, 7]              leads from context to goal if taken `steps` times

  the landscapes, for each plane such as xy
    planes              [n] text            the planes
    actions_xy          [P, K, 7]           the grid
    energy_xy           [C, P, K]           the landscape

  direction apart from magnitude (S actions as long as the true one, R along it)
    actions_shell       [P, S, 7]           directions spread over the sphere; rotation and gripper
                                            are the truth's
    energy_shell        [C, P, S]
    ray_multiples       [R]                 of the true move, with 0 and 1
    actions_ray         [P, R, 7]
    energy_ray          [C, P, R]

  control: do actions matter?
    energy_true         [C, P]              energy of the true action
    energy_zero         [C, P]              of no motion, preferred on unfamiliar images
    negatives           [P, M, 7]           real actions of other moments
    energy_negatives    [C, P, M]           is the true action preferred to others as plausible?
    loss                [C, P]              teacher-forcing loss with the clip's own actions
    shuffled            [P, T-1, 7]         real actions of other moments
    loss_shuffled       [C, P]              loss with those: no higher if actions are ignored
    loss_zero           [C, P]              loss with zero actions: likewise

  control: is the prediction better than none?
    horizon_l1          [C, P, T-1]         L1 of the model's own prediction k frames ahead
    horizon_copy        [P, T-1]            L1 of a copy of the context frame: small where little
                                            moves, so that horizon_l1 alone says little

  control: encoder upper bound, with real frames in place of predictions
    oracle_actions      [P, F, 7]           change of pose from the context to each frame
    oracle_energy       [P, F]              L1 between that frame and the goal: what a perfect
                                            predictor would reach with this encoder
    oracle_truth        [P, 7]              change of pose from the context to the goal

  control: self-consistency of the baseline
    null_difference     []                  largest energy difference of the base model to itself
                                            with adapters of zeros (first pair, first plane);
                                            changes below it are numerical noise

  L2 energies, the mean of the squares, beside each L1 energy
    l2_xy, l2_true …    as energy_xy …
    l2_horizon          [C, P, T-1]         as horizon_l1
    l2_horizon_copy     [P, T-1]

  the planners cem, cem_jepa_wms, mppi and gradient, absent if not run
    plan_horizons       [H] int             how many frames ahead each plan looks
    cem_moves           [C, P, H, 3]        metres; sum of the planned moves, 1 … H frames ahead
    cem_energy          [C, P, H]           energy of the plan
    cem_seconds         [C, P, H]           seconds
    true_moves          [P, H, 3]           metres; the true displacement over as many frames

  the settings
    context             [] int              frames that are known before the action
    protocol, objective [] text             energy.protocol; the energy that planners lower
    also                [] text             energy.also, if this is the second data set
    settings            [] text             fingerprint of pairs, weights and settings
    radius              []                  metres; half width of grids and of the planners' box
    steps, frame_step   []                  the goal lies steps x frame_step recorded frames on
    device, dtype, base [] text             GPU or CPU, precision, fingerprint of the base model

  what report.html says besides; each may be absent
    about_data          [lines] text        episodes, clips, rate and moves of the data sets
    validation          [names] text        all validation episodes, as far as they were looked at
    command             [words] text        measures the same
    commit              [] text             of the code
    log_runs            [runs] text         training runs of the checkpoints
    log_values          [runs, rows, 6]     what their metrics.jsonl holds: step, loss, val_loss,
                                            val_l1, val_shuffled, val_copy; NaN where not logged
    run_of              [C] int             the run that a checkpoint is of; -1 unknown
"""
